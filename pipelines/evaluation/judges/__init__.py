"""Judges: vision-language models that score results against a rubric."""
