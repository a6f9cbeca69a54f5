"""Raw samples to shards: plan, assess, caption, encode, write, account."""
