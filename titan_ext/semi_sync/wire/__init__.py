"""How tensors travel between sites: codecs, reductions, aggregations, and the bytes they cost."""
