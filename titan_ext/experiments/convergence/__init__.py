"""What ``titan-ext bench convergence`` is made of: text, sites in one process, runs, tuning, and the report."""
