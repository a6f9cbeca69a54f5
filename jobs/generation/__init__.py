"""``loomvideo generate``."""
