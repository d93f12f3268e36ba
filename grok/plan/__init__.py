"""What hardware has, and what a run needs of it."""
