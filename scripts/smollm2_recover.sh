#!/usr/bin/env bash
# Recovers a pruned SmolLM2 by LoRA on C4 with its mask kept, and measures WikiText-2 and C4 before and after.
# Shorter than the paper's 4096 windows with 400 steps of warm-up: 512 windows of 2048 tokens, two a step, so 256 steps,
# 26 of them warm-up. Expected: WikiText-2 falls, C4 (validation; training reads the training part) is not 2% worse.
# Cost on one H100: 1.8 minutes, evaluation included; the table is in FOLDER/report.md, and going on is resume=FOLDER.
# Usage: scripts/smollm2_recover.sh RUN FOLDER [overrides]
#   RUN: the folder of a pruning run, such as scripts/smollm2_table.sh leaves as sparsegpt-2of4-per_layer
set -euo pipefail
run=$1 folder=$2
shift 2
# shellcheck disable=SC2086  # DROTATOR may be several words
exec ${DROTATOR:-drotator} recover "model.path=$run/checkpoint" calibration=c4 calibration.num_samples=512 \
    calibration.batch_size=2 recover.warmup_steps=26 eval=perplexity "hydra.run.dir=$folder" "$@"
