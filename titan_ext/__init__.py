"""titan_ext: a torchtitan extension that trains language models across datacenters."""

__version__ = "0.1.0"
