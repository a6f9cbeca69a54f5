"""Fused operations with interchangeable back ends."""
