"""Claims of papers with a model of some ten thousand parameters (``titan-ext bench tiny``)."""
