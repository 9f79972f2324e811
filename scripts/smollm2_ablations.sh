#!/usr/bin/env bash
# The README's ablations: the sweeps of configs/experiment/ablation-*.yaml, WikiText-2 perplexity.
# Expected: the values in README.md within 3%. Cost on one H100: about a minute a run, 54 runs.
# Usage: [JOBS=3] scripts/smollm2_ablations.sh FOLDER [NAME ...]
set -euo pipefail
export folder=$1 DROTATOR=${DROTATOR:-drotator}
shift
names=("$@")
[ ${#names[@]} -gt 0 ] || names=(steps objective scope optimizer samples parts permutations reconstruct batches)

run() { $DROTATOR prune "+experiment=ablation-$1" baseline=never "hydra.sweep.dir=$folder/$1"; }
export -f run

printf '%s\n' "${names[@]}" | xargs -P "${JOBS:-1}" -I NAME bash -c "run NAME"
