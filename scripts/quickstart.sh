#!/usr/bin/env bash
# The main job on a real model, with nothing but Python 3.11+ and a package index: SmolLM2-135M-Instruct, SparseGPT 2:4,
# dense, plain and rotated side by side. Expected time after installation: 5.5 minutes on 2 CPU cores, 2 GB of memory.
# Words after it go to the command: scripts/quickstart.sh pruner=wanda
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Few steps for two cores; the full training is one word away: scripts/quickstart.sh optimizer.steps=200
settings=(optimizer.steps=20)

"$root/scripts/install.sh"
exec "${DROTATOR_VENV:-$root/.venv}/bin/drotator" prune ${settings[@]+"${settings[@]}"} "$@"
