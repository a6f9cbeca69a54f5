"""``loomvideo data``: make, prepare and look at datasets."""
