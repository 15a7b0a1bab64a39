"""One file a format. A new one registers itself; no other file lists it."""
