"""Convergence against participation: how many of how many data sources train in a round (Photon, arXiv 2411.02908)."""
