#!/usr/bin/env bash
# Times and memory at the shapes of LLaMA3 8B and 70B with random weights, the paper's formulation beside them, and a
# layer dense, 2:4 and with its boundary matrix, all in one list in FOLDER/bench.json.
# Took 11 minutes on one H100, in parts; needs 10 GB of disk in FOLDER while it runs, and no hub.
# Usage: [DROTATOR="python3 -m drotator"] scripts/bench.sh FOLDER [overrides for every run]
set -uo pipefail
folder=$1
shift
status=0

run() { # name of the run's folder, then its overrides
    local name=$1
    shift
    ${DROTATOR:-drotator} bench "hydra.run.dir=$folder/$name" "$@" || status=$?
}

steps=('bench.objectives=[entropy,pruning_error]' bench.paper=true)
hundred=(optimizer.steps=100 bench.layers=0)
half=('bench.objectives=[entropy,pruning_error]' optimizer.batches=2 "${hundred[@]}")
run llama3-8b model=llama3-8b "${steps[@]}" "$@"
run llama3-70b model=llama3-70b "${steps[@]}" bench.layers=1 offload=host "$@"
run llama3-8b-100 model=llama3-8b "${hundred[@]}" "$@"
run llama3-70b-100 model=llama3-70b "${hundred[@]}" "$@"
run llama3-8b-batches model=llama3-8b "${half[@]}" "$@"
run llama3-70b-batches model=llama3-70b "${half[@]}" "$@"
run llama3-8b-inference kind=inference model=llama3-8b bench.compile=true "$@"

# A run that was stopped has left what it measured.
"${PYTHON:-python3}" - "$folder" <<'MERGE'
import json
import sys
from pathlib import Path

folder = Path(sys.argv[1])
rows = [row for path in sorted(folder.glob("*/bench.json")) for row in json.loads(path.read_text())]
(folder / "bench.json").write_text(json.dumps(rows, indent=2) + "\n")
print(f"{len(rows)} rows in {folder / 'bench.json'}")
MERGE
exit "$status"
