"""``loomvideo evaluate``, ``compare``, ``gate``, ``arena`` and ``agreement``."""
