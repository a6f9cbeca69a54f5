"""``loomvideo serve``."""
