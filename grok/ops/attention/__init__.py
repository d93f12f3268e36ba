"""Attention: the plain form, and those for one row, for pages, and for TPUs."""
