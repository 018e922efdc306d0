"""Data sources of a site (Photon's clients, arXiv 2411.02908): who trains in a round, where, and one after the other."""
