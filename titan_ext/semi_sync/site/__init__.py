"""The ranks of one site, and how they exchange with those of another: rank by rank, or through a leader."""
