"""Weights on disk in the formats that models were published in: read, written, compared."""
