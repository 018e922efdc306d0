#!/usr/bin/env bash
# Trains one small model at two sites on this machine: makes .venv if there is none, installs, and runs.
#
#   bash launch/local.sh [flags of `titan-ext launch`, such as --training.steps 40]
#
#   TITAN_EXT_VENV    folder of the virtual environment (default: .venv in the repository)
#   TITAN_EXT_PYTHON  Python to make it with, 3.11 or newer (default: the newest that is found)
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

install_titan_ext ""
cd "$repository"
exec "$venv/bin/titan-ext" launch train_configs/demo.toml "$@"
