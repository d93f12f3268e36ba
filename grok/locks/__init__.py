"""Locks of folders, which one job at a time writes."""
