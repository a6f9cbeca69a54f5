"""Media files: opening, decoding in a process of their own, fragments of files, and writing video."""
