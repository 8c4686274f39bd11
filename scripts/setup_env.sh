#!/usr/bin/env bash
# Makes the virtual environment that the other scripts use, or finds it complete and returns at once.
#
#   bash scripts/setup_env.sh                      # .venv in the repository
#   VENV=~/envs/elip bash scripts/setup_env.sh     # another place; packages already in there are kept
#
# Other scripts source it; it then leaves ROOT, VENV and PYTHON (the environment's interpreter) set.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
case "$VENV" in /*) ;; *) VENV="$PWD/$VENV" ;; esac
PYTHON="$VENV/bin/python"

setup_fail() {
    echo "setup: $*" >&2
    exit 1
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

has_pip() { "$1" -m pip --version >/dev/null 2>&1; }

make_venv() {
    local candidate newest=""
    for candidate in python3.13 python3.12 python3.11 python3.10 python3; do
        new_enough "$candidate" || continue
        newest="$candidate"
        "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1 || continue
        echo "setup: making a virtual environment in $VENV with $("$candidate" --version)"
        "$candidate" -m venv --clear "$VENV" || setup_fail "$candidate could not make a virtual environment in $VENV."
        return
    done
    if [ -n "$newest" ]; then
        setup_fail "$newest has no venv module: install it (python3-venv on Debian and Ubuntu), or set VENV to an existing environment."
    fi
    setup_fail "no Python 3.10 or newer was found: install one, or set VENV to a virtual environment that has it."
}

# What the environment must agree with: the requirements, and the checkout that the editable install points to.
fingerprint() {
    "$PYTHON" - "$ROOT" <<'PY'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
print(hashlib.sha256((root / "setup.py").read_bytes() + str(root).encode()).hexdigest())
PY
}

# Whether the package and all that it requires, extras included, are there. Looks at metadata only: no slow imports.
nothing_missing() {
    "$PYTHON" - <<'PY' >/dev/null 2>&1
import importlib.metadata as metadata, re
for requirement in metadata.distribution("open_clip_elip").requires:
    metadata.distribution(re.match(r"[\w.-]+", requirement)[0])
PY
}

pip_install() {
    local log="$VENV/setup.log"
    if ! (cd "$ROOT" && "$PYTHON" -m pip install --disable-pip-version-check "$@" >"$log" 2>&1); then
        tail -n 15 "$log" >&2
        setup_fail "pip install $* failed (all of its output is in $log): check the network and run the same command again."
    fi
}

if [ ! -x "$PYTHON" ] || ! has_pip "$PYTHON"; then
    # --clear above empties the folder, so only one that is a virtual environment, or nothing yet, may be meant.
    if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV" 2>/dev/null || echo file)" ]; then
        setup_fail "$VENV exists and is not a virtual environment with pip: set VENV to another place."
    fi
    make_venv
elif ! new_enough "$PYTHON"; then
    setup_fail "$VENV has $("$PYTHON" --version), but 3.10 or newer is needed: delete it, or set VENV to another place."
fi

STAMP="$VENV/open_clip_elip.stamp"
if [ "$(cat "$STAMP" 2>/dev/null)" != "$(fingerprint)" ] || ! nothing_missing; then
    rm -f "$STAMP"
    echo "setup: installing torch and torchvision (a few GB where they come with CUDA: 1 to 15 minutes, once)"
    pip_install torch torchvision
    echo "setup: installing this package and what it needs (about a minute)"
    pip_install -e '.[quickstart,test,profile,export]'
    fingerprint >"$STAMP"
    echo "setup: done"
fi
