#!/usr/bin/env bash
# The README's tables: SmolLM2-135M-Instruct, C4 calibration 128 x 2048, WikiText-2 and C4 perplexity, five zero-shot tasks.
# Expected: the values in README.md within 3%. Cost on one H100: 1 to 2 minutes a run for perplexity; zero-shot tasks
# (eval=full) take 2 minutes alone and 5 to 7 beside six others; give those eval.batch_size=32, for each holds the logits of a
# whole batch. Where a result has eval/metrics.json, the run had eval=none and `drotator eval` measured its checkpoint.
# Usage: [JOBS=3] scripts/smollm2_table.sh PART FOLDER [overrides for every run]
#   PART: paper (its pruners and objective), ours (all that goes beyond), seeds (calibration seeds),
#   fifty (what helps at 50%), float8 (seeds and steps with products in 8 bits; needs a GPU that has them), or all
set -euo pipefail
part=$1
export folder=$2
shift 2
export DROTATOR=${DROTATOR:-drotator} common="$*"

# name of the run's folder, then its overrides
paper() {
    echo "sparsegpt-2of4-paper eval=perplexity objective=entropy optimizer=adam_qr optimizer.steps=400"
    echo "sparsegpt-2of4-entropy eval=perplexity objective=entropy optimizer=riemannian_adam"
    echo "sparsegpt-50-entropy eval=perplexity sparsity=50 objective=entropy optimizer=riemannian_adam"
    echo "wanda-2of4-entropy eval=perplexity pruner=wanda objective=entropy optimizer=riemannian_adam"
    for pruner in sparsegpt wanda magnitude; do
        for sparsity in 2of4 50; do
            echo "$pruner-$sparsity-none eval=full pruner=$pruner sparsity=$sparsity rotation=none"
            echo "$pruner-$sparsity-per_layer eval=full pruner=$pruner sparsity=$sparsity"
        done
    done
}

ours() {
    echo "sparsegpt-2of4-shared-reconstruct eval=full rotation=shared reconstruct=block"
    echo "sparsegpt-2of4-per_layer-reconstruct eval=full reconstruct=block"
    echo "admm-2of4-per_layer-reconstruct eval=full pruner=admm reconstruct=block"
    echo "admm-2of4-per_layer eval=full pruner=admm"
    echo "sparsegpt-2of4-shared eval=full rotation=shared"
    echo "sparsegpt-2of4-none-reconstruct eval=perplexity rotation=none reconstruct=block"
    echo "admm-2of4-none eval=perplexity pruner=admm rotation=none"
    echo "sparsegpt-2of4-per_layer-400 eval=perplexity optimizer.steps=400"
    echo "sparsegpt-2of4-per_layer-solve eval=perplexity pruner.solve_steps=10"
    echo "sparsegpt-2of4-shared-5 eval=perplexity rotation=shared rotation.groups=5"
}

seeds() {
    local words="eval=perplexity model.dtype=bfloat16 optimizer.products=bfloat16"
    for seed in 0 1 2; do
        echo "sparsegpt-2of4-per_layer-seed$seed $words calibration.seed=$seed"
        echo "sparsegpt-2of4-none-seed$seed $words rotation=none calibration.seed=$seed"
        echo "sparsegpt-50-per_layer-seed$seed $words sparsity=50 calibration.seed=$seed"
    done
}

float8() {
    local words="eval=perplexity model.dtype=bfloat16"
    for seed in 0 1 2; do
        echo "sparsegpt-2of4-per_layer-float8-seed$seed $words calibration.seed=$seed"
        echo "sparsegpt-2of4-per_layer-float8-100-seed$seed $words calibration.seed=$seed optimizer.steps=100"
        echo "sparsegpt-50-per_layer-float8-seed$seed $words calibration.seed=$seed sparsity=50"
    done
    echo "sparsegpt-2of4-entropy-float8 $words objective=entropy optimizer=riemannian_adam"
}

fifty() {
    local words="eval=perplexity eval.perplexity=[wikitext2] model.dtype=bfloat16 optimizer.products=bfloat16 sparsity=50"
    echo "sparsegpt-50-per_layer-uniform eval=perplexity sparsity=50 pruner.weights=uniform"
    echo "sparsegpt-50-per_layer-bfloat16 $words"
    echo "sparsegpt-50-per_layer-cold $words optimizer.warm_start=false"
    echo "sparsegpt-50-none-weighed $words rotation=none pruner.weights=sensitivity"
    echo "admm-50-per_layer $words pruner=admm"
    echo "sparsegpt-50-entropy-bfloat16 $words objective=entropy optimizer=riemannian_adam"
    local entropy="sparsity=50 objective=entropy optimizer=riemannian_adam"
    echo "sparsegpt-50-entropy-weighed eval=perplexity $entropy pruner.weights=sensitivity"
    echo "sparsegpt-50-entropy-0.03-float32 eval=perplexity $entropy optimizer.learning_rate=0.03"
}

all() { paper && ours && seeds && fifty && float8; }

run() {
    local name=$1
    shift
    # shellcheck disable=SC2086  # several words
    $DROTATOR prune model=smollm2-135m calibration=c4 baseline=never "hydra.run.dir=$folder/$name" "$@" $common
}
export -f run

"$part" | xargs -P "${JOBS:-1}" -I LINE bash -c "run LINE"
