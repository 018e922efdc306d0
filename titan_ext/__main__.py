"""``python -m titan_ext`` is ``titan-ext``."""

import sys

from titan_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
