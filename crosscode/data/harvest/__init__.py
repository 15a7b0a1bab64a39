"""Tokens to activations of language models."""
