"""``titan-ext selftest``: what this machine's device computes, against the same on the CPU."""
