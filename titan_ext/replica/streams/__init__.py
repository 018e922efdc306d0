"""The connections between sites: several to each peer, over which every message is spread."""
