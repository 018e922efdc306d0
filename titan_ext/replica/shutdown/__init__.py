"""A site that is told to leave stops its ranks together, saves, and goes."""
