#!/usr/bin/env bash
# One site of a run on several machines, or one node of it. Every site uses the same file.
#
#   bash launch/site.sh FILE.toml SITE http://LIGHTHOUSE:29510 [flags of `titan-ext launch`]
#   bash launch/site.sh --install              no more than the installation
#
# A site of several nodes (nodes = 4 in its table) needs the same command on each of them. Slurm, Kubernetes and SkyPilot
# tell which node that is and where the first one is; elsewhere add --node-rank K --rendezvous HOST_OF_NODE_0.
#
# Relative paths in the file count from the folder where this is run.
#
#   TITAN_EXT_VENV    folder of the virtual environment (default: .venv in the repository)
#   TITAN_EXT_PYTHON  Python to make it with, 3.11 or newer (default: the newest that is found)
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if [[ "$*" == --install ]]; then
    install_titan_ext ""
    exit
fi
if (($# < 3)) || [[ "$1" == -* || "$2" == -* || "$3" == -* ]]; then
    fail "usage: launch/site.sh FILE.toml SITE http://LIGHTHOUSE:29510 [flags]"
fi
install_titan_ext ""
exec "$venv/bin/titan-ext" launch "$1" --only "$2" --lighthouse "$3" --plain "${@:4}"
