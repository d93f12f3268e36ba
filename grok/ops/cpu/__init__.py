"""Kernels in C for XLA on CPU, and their compilation."""
