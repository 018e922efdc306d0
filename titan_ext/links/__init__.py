"""The links between sites: what one is, and how long a TCP connection takes for a message over it."""
