"""SparsyFed against dense training and plain top-k pruning (arXiv 2504.05153)."""
