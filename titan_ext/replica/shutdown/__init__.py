"""A site that is asked to stop stops its ranks together, saves, and leaves the run."""
