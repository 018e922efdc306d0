"""What weights by similarity to anchors are worth on text that is in part off-topic or noise (ADAPT, arXiv 2605.05227)."""
