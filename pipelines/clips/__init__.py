"""Cutting films into clips once, so that every later stage reads short files."""
