"""titan_ext: a torchtitan extension that trains language models across datacenters."""

import os

from titan_ext.trainer import import_hook

__version__ = "0.1.0"

import_hook.install()
# Before torch first allocates: large tensors lie on large pages, whose first touch costs a fraction of that of small ones.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
