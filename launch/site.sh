#!/usr/bin/env bash
# One site of a run on several machines, with all GPUs of this one. Every site uses the same file.
#
#   bash launch/site.sh FILE.toml SITE http://LIGHTHOUSE:29510 [flags of `titan-ext launch`]
#
# Relative paths in the file count from the folder where this is run.
#
#   TITAN_EXT_VENV    folder of the virtual environment (default: .venv in the repository)
#   TITAN_EXT_PYTHON  Python to make it with, 3.11 or newer (default: the newest that is found)
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if (($# < 3)) || [[ "$1" == -* || "$2" == -* || "$3" == -* ]]; then
    fail "usage: launch/site.sh FILE.toml SITE http://LIGHTHOUSE:29510 [flags]"
fi
install_titan_ext ""
exec "$venv/bin/titan-ext" launch "$1" --only "$2" --lighthouse "$3" --plain "${@:4}"
