"""The sync plan: what is exchanged, when, for which parameters, and by which sites."""
