"""``loomvideo weights`` and ``loomvideo checkpoint``: what a checkpoint is and which one a command means."""
