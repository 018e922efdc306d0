"""Which sites lose by taking part, with regularisers towards the received model and without (arXiv 2305.02728)."""
