"""titan_ext: a torchtitan extension that trains language models across datacenters."""

from titan_ext.trainer import import_hook

__version__ = "0.1.0"

import_hook.install()
