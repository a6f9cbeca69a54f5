"""``loomvideo kernels``."""
