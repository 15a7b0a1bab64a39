"""Planted dictionaries, and what training schemes recover of them."""
