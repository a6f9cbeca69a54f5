"""The network and its mathematics."""
