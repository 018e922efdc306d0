#!/usr/bin/env bash
# Runs the tests: makes .venv if there is none, installs, and runs ruff, mypy and pytest.
#
#   bash launch/test.sh [flags of pytest, such as -k launcher, or -n 0 for one process]
#
#   TITAN_EXT_VENV    folder of the virtual environment (default: .venv in the repository)
#   TITAN_EXT_PYTHON  Python to make it with, 3.11 or newer (default: the newest that is found)
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

install_titan_ext "[test]"
cd "$repository"
"$venv/bin/python" -m ruff check --quiet
"$venv/bin/python" -m ruff format --check --quiet
"$venv/bin/python" -m mypy --no-error-summary
# A file's tests share processes and models, so that they stay together.
exec "$venv/bin/python" -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@"
