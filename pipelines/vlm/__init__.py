"""Asking vision-language models: requests, servers, local models, sessions that pay for an answer once."""
