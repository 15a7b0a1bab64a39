"""Formats of other libraries, both ways: one file a format in `formats`, each written from and read into `PlainCoder`."""
