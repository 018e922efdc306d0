#!/usr/bin/env bash
# The lighthouse of a run on several machines: start it where every site reaches it, and leave it running.
#
#   bash launch/lighthouse.sh --min-sites 2 [--bind 0.0.0.0:29510] [further flags of `titan-ext lighthouse`]
#
#   TITAN_EXT_VENV    folder of the virtual environment (default: .venv in the repository)
#   TITAN_EXT_PYTHON  Python to make it with, 3.11 or newer (default: the newest that is found)
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

install_titan_ext ""
exec "$venv/bin/titan-ext" lighthouse "$@"
