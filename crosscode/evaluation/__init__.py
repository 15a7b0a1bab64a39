"""Held-out figures: explained variance, sparsity, the loss that splicing recovers."""
