#!/usr/bin/env bash
# Installs drotator with its development tools and runs the tests: CPU only, no network beyond the package index.
# Words after it go to pytest: scripts/test.sh -k pruners
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

"$root/scripts/install.sh" dev
cd "$root"
exec "${DROTATOR_VENV:-$root/.venv}/bin/python" -m pytest "$@"
