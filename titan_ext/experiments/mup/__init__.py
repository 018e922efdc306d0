"""One learning rate for all widths, with muP and without (arXiv 2203.03466)."""
