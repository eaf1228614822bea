"""Training: the pocket model and its data."""
