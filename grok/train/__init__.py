"""Training: state, optimizer, losses, the step as a pure function, and the loop around it."""
