#!/usr/bin/env bash
# The README's table: SmolLM2-135M-Instruct, C4 calibration 128 x 2048, WikiText-2 and C4 perplexity, five zero-shot tasks.
# Expected: the values in README.md within 3%. Cost: about 20 GPU minutes on one H200 with JOBS=1.
# Usage: scripts/smollm2_table.sh FOLDER [further overrides for every run]   (JOBS=4 runs four at a time)
set -euo pipefail
folder=$1
shift
export DROTATOR=${DROTATOR:-drotator}

runs() {
    local pruner sparsity
    for pruner in magnitude wanda sparsegpt; do
        for sparsity in 50 2of4; do
            echo "$pruner-$sparsity-none pruner=$pruner sparsity=$sparsity rotation=none"
            echo "$pruner-$sparsity-per_layer pruner=$pruner sparsity=$sparsity rotation=per_layer"
        done
    done
    for sparsity in 50 2of4; do
        echo "sparsegpt-$sparsity-entropy pruner=sparsegpt sparsity=$sparsity objective=entropy optimizer=riemannian_adam"
    done
    echo "wanda-2of4-entropy pruner=wanda sparsity=2of4 objective=entropy optimizer=riemannian_adam"
    echo "sparsegpt-2of4-paper pruner=sparsegpt sparsity=2of4 objective=entropy optimizer=adam_qr optimizer.steps=400"
}

run() {
    local name=$1
    shift
    $DROTATOR prune model=smollm2-135m calibration=c4 eval=full baseline=never "hydra.run.dir=$folder/$name" "$@"
}
export -f run
export folder

# The first run measures the dense model, which all others then read from the cache.
runs | head -n 1 | while read -r line; do run $line "$@" < /dev/null; done
runs | tail -n +2 | xargs -P "${JOBS:-1}" -I LINE bash -c "run LINE $*"
