#!/usr/bin/env bash
# Makes the virtual environment that the other scripts use (.venv at the root, or $DROTATOR_VENV) and installs drotator
# there with the versions of constraints.txt: scripts/install.sh [EXTRA]. Does nothing when that is done already.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${DROTATOR_VENV:-$root/.venv}
extra=${1:-}

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.12 python3.11 python3.13 python; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "install.sh: no Python 3.11 or newer with venv found; name one with PYTHON=..." >&2
    exit 2
}

# An environment that was broken off half-way, or moved, is made again.
if ! "$venv/bin/python" -m pip --version > /dev/null 2>&1; then
    python=$(find_python)
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi

wanted=$(cat "$root/pyproject.toml" "$root/scripts/constraints.txt" | "$venv/bin/python" -c \
    'import hashlib, sys; print(sys.version_info[:2], hashlib.sha256(sys.stdin.buffer.read()).hexdigest(), sys.argv[1])' "$root")
for stamp in "$venv/drotator-${extra:-base}.stamp" "$venv/drotator-dev.stamp"; do # dev holds all that the others hold
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && [ -x "$venv/bin/drotator" ]; then
        exit 0
    fi
done

echo "Installing drotator and its dependencies in $venv (a few minutes the first time)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$root/scripts/constraints.txt" --editable "$root${extra:+[$extra]}"
echo "$wanted" > "$venv/drotator-${extra:-base}.stamp"
