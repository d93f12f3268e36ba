"""Optimizers, schedules, and which parameters each works on."""
