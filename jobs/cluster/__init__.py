"""Commands around a cluster."""
