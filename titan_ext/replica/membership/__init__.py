"""Which sites take part: admission by a shared secret, and the quorum."""
