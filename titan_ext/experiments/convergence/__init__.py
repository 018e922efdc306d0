"""Methods of the outer loop against data parallelism (``titan-ext bench convergence``)."""
