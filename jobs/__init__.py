"""Job entry points."""
