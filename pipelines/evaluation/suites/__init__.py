"""Benchmarks: their official files, their scoring rules, and our own suites."""
