"""Lets every module import torchtitan in any order on a machine without an accelerator.

torchtitan settles on its device when ``torchtitan.tools.utils`` is imported. ``titan_ext/__init__.py``, which Python
runs before any other module of this package, installs a finder that imports ``titan_ext.trainer.cpu`` just before the
first module of torchtitan. Installing it imports neither torch nor torchtitan.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _BeforeTorchtitan(MetaPathFinder):
    """Finds nothing itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.startswith("torchtitan."):
            import_module("titan_ext.trainer.cpu")
        return None


def install() -> None:
    """Prepare the first import of torchtitan; does nothing where torchtitan has settled on its device.

    ``titan_ext.trainer.cpu`` says so when it is imported, for only what trains needs the right device.
    """
    if "torchtitan.tools.utils" not in sys.modules:
        sys.meta_path.insert(0, _BeforeTorchtitan())
