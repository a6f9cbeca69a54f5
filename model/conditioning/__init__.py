"""Frozen networks around the DiT: the MLLM and its inputs."""
