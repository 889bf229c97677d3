#!/usr/bin/env bash
# Fills h100.json, h100_modes.json, h100_training.json and h100_channels.json in this folder, or in
# the one that is named, and draws h100.png: our models beside timm's ViT of the same width. Some
# twenty minutes on one GPU and 16 cores: everything is compiled first, in parallel, then measured
# in a row. Rows that are there are measured again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$(cd "${1:-$here}" && pwd)
export TORCHINDUCTOR_COMPILE_THREADS=1 OMP_NUM_THREADS=4

tables() { # calls "$1 FILE SIZES BATCHES MODELS and options" for every table
    local ours="fastvim_tiny_patch16_224 fastvim_small_patch16_224 fastvim_base_patch16_224"
    local vits="vit_tiny_patch16_224 vit_small_patch16_224 vit_base_patch16_224"
    local all="224 512 1024 2048"
    "$1" h100.json "$all" "128 32 8 2" $ours vim_tiny_patch16_224 --mode graph --dtype bfloat16
    "$1" h100.json "$all" "128 32 8 2" $vits --mode compiled-graph --dtype bfloat16
    local tiny="fastvim_tiny_patch16_224 vit_tiny_patch16_224"
    "$1" h100_modes.json 224 1 $tiny --mode graph compiled-graph --dtype bfloat16
    "$1" h100_modes.json 224 128 $tiny --mode eager compiled --dtype bfloat16
    local train="--train --mode graph compiled-graph"
    "$1" h100_training.json "224 512 1024" "128 16 4" $tiny $train
    "$1" h100_training.json 224 128 fastvim_small_patch16_224 vit_small_patch16_224 $train
    "$1" h100_training.json 224 64 fastvim_base_patch16_224 vit_base_patch16_224 $train
}

channels() { # eight channels in patches of 8 beside a ViT over as many tokens, 6,272
    local ours="fastchannelvim_small_patch8_224 channelvim_small_patch8_224"
    local vit="vit_small_patch16_224 --mode compiled-graph"
    "$1" h100_channels.json 224 32 $ours --mode graph --dtype bfloat16
    "$1" h100_channels.json 1024x1568 32 $vit --dtype bfloat16
    "$1" h100_channels.json 224 8 $ours --mode graph --train
    "$1" h100_channels.json 1024x1568 8 $vit --train
}

warm() { # a process for each model and size, 14 at a time
    local sizes=($2) batches=($3) options=() models=() argument
    for argument in "${@:4}"; do
        if [[ $argument == -* || ${#options[@]} -gt 0 ]]; then
            options+=("$argument")
        else
            models+=("$argument")
        fi
    done
    for argument in "${models[@]}"; do
        for i in "${!sizes[@]}"; do
            while (($(jobs -rp | wc -l) >= 14)); do wait -n || true; done
            python -m fastvim_cli benchmark "$argument" "${options[@]}" --size "${sizes[i]}" \
                --batch "${batches[i]}" --no-check --no-roofline --warmup 1 --repeats 1 \
                >/dev/null 2>&1 || echo "$argument at ${sizes[i]} pixels: not compiled" >&2 &
        done
    done
}

status=0
measure() {
    python -m fastvim_cli benchmark "${@:4}" --size $2 --batch $3 --out "$folder/$1" --append ||
        status=1 # a row failed, and says why
}

tables warm
channels warm
wait
tables measure
channels measure
python -m fastvim_cli benchmark --from "$folder/h100.json" --markdown --plot "$folder/h100.png"
for table in h100_modes h100_training h100_channels; do
    python -m fastvim_cli benchmark --from "$folder/$table.json" --markdown
done
exit $status
