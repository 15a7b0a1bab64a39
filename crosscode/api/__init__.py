"""From Python: train, open, look."""
