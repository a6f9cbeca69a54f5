"""Ray Data graphs: raw media to shards, and evaluation."""
