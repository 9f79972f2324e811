#!/usr/bin/env bash
# The README's table: SmolLM2-135M-Instruct, C4 calibration 128 x 2048, WikiText-2 and C4 perplexity, five zero-shot tasks.
# Expected: the values in README.md within 3%. Cost: 2 to 4 minutes for each of the 16 runs on one H200.
# Usage: [JOBS=3] scripts/smollm2_table.sh FOLDER [overrides for every run]
set -euo pipefail
export folder=$1
shift
export DROTATOR=${DROTATOR:-drotator} common="$*"

# name of the run's folder, then its overrides
runs() {
    echo "sparsegpt-2of4-none eval=full pruner=sparsegpt sparsity=2of4 rotation=none"
    echo "sparsegpt-2of4-per_layer eval=full pruner=sparsegpt sparsity=2of4"
    echo "sparsegpt-2of4-paper eval=perplexity pruner=sparsegpt sparsity=2of4 objective=entropy optimizer=adam_qr optimizer.steps=400"
    echo "sparsegpt-2of4-entropy eval=perplexity pruner=sparsegpt sparsity=2of4 objective=entropy optimizer=riemannian_adam"
    echo "sparsegpt-50-entropy eval=perplexity pruner=sparsegpt sparsity=50 objective=entropy optimizer=riemannian_adam"
    echo "wanda-2of4-entropy eval=perplexity pruner=wanda sparsity=2of4 objective=entropy optimizer=riemannian_adam"
    echo "wanda-2of4-none eval=full pruner=wanda sparsity=2of4 rotation=none"
    echo "wanda-2of4-per_layer eval=full pruner=wanda sparsity=2of4"
    for pruner in sparsegpt wanda magnitude; do
        echo "$pruner-50-none eval=full pruner=$pruner sparsity=50 rotation=none"
        echo "$pruner-50-per_layer eval=full pruner=$pruner sparsity=50"
    done
    echo "magnitude-2of4-none eval=full pruner=magnitude sparsity=2of4 rotation=none"
    echo "magnitude-2of4-per_layer eval=full pruner=magnitude sparsity=2of4"
}

run() {
    local name=$1
    shift
    # shellcheck disable=SC2086  # several words
    $DROTATOR prune model=smollm2-135m calibration=c4 baseline=never "hydra.run.dir=$folder/$name" "$@" $common
}
export -f run

runs | xargs -P "${JOBS:-1}" -I LINE bash -c "run LINE"
