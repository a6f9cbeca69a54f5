"""Assessments before encoding, as pure functions on decoded frames: quality, text, pairs, duplicates, shots."""
