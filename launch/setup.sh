# shellcheck shell=bash
# Sourced by the scripts beside it: makes the virtual environment and installs titan_ext, once.
#
#   TITAN_EXT_VENV    folder of the virtual environment (default: .venv in the repository)
#   TITAN_EXT_PYTHON  Python to make it with, 3.11 or newer (default: the newest that is found)

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${TITAN_EXT_VENV:-$repository/.venv}"

fail() {
    echo "titan-ext: error: $*" >&2
    exit 2
}

# A name on the PATH is not enough: version managers put stand-ins there that only complain when run.
is_new_enough() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate
    if [[ -n "${TITAN_EXT_PYTHON:-}" ]]; then
        is_new_enough "$TITAN_EXT_PYTHON" ||
            fail "TITAN_EXT_PYTHON=$TITAN_EXT_PYTHON is not a Python 3.11 or newer with venv and pip"
        echo "$TITAN_EXT_PYTHON"
        return
    fi
    for candidate in python3.13 python3.12 python3.11 python3; do
        if is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    local found
    found="$(python3 --version 2>/dev/null || echo 'no python3')"
    fail "needs Python 3.11 or newer with venv and pip; found $found. Install one (Debian, Ubuntu:" \
        "apt install python3 python3-venv), or name it: TITAN_EXT_PYTHON=/path/to/python"
}

# What is installed is recorded last, so an interrupted installation is taken up again by the next run.
# The place is part of it: a repository or environment that was moved must be installed anew.
wanted_stamp() {
    echo "$repository $venv $1 $(sha256sum <"$repository/pyproject.toml" | cut -d' ' -f1)"
}

# install_titan_ext EXTRAS: "" or "[test]". The environment with extras also serves whoever needs none.
install_titan_ext() {
    is_installed "$1" && return
    mkdir -p "$(dirname "$venv")"
    # Nodes that share a file system may all come here at once.
    (
        if command -v flock >/dev/null; then flock 9; fi
        is_installed "$1" || install_anew "$1"
    ) 9>"$venv.lock"
}

is_installed() {
    local stamp="$venv/titan-ext.installed"
    [[ -f "$stamp" ]] && { grep -qxF "$(wanted_stamp "[test]")" "$stamp" || grep -qxF "$(wanted_stamp "$1")" "$stamp"; }
}

install_anew() {
    local extras="$1" stamp="$venv/titan-ext.installed" python quiet=()
    if ! is_new_enough "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        # What is there will be deleted.
        if [[ -n "$(ls -A "$venv" 2>/dev/null)" && ! -f "$venv/pyvenv.cfg" && "$venv" != "$repository/.venv" ]]; then
            fail "TITAN_EXT_VENV=$venv holds something that is not a virtual environment: choose another folder"
        fi
        python="$(find_python)"
        echo "Making a virtual environment in $venv with $("$python" --version)"
        "$python" -m venv --clear "$venv"
    fi
    echo "Installing titan_ext; the first time this takes some minutes (PyTorch and its libraries are about 5 GB)"
    rm -f "$stamp"
    [[ -t 1 ]] || quiet=(--quiet)
    "$venv/bin/python" -m pip install "${quiet[@]}" --disable-pip-version-check --editable "$repository$extras" ||
        fail "the installation failed; its reason is above. Run this again to take it up where it ended"
    wanted_stamp "$extras" >"$stamp"
}
