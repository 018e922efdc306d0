"""The ranks of one site, and how they exchange with those of another: by rank or by leader."""
