"""Activations of the user's own as a source of rows."""
