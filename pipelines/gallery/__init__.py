"""``report.html``: what a dataset is, what was lost on the way, and a gallery of every sample."""
