"""Evaluation of weights in any format: loss and bits per byte on texts, and tasks of lm-eval."""
