#!/usr/bin/env bash
# Fills benchmarks/h100.json and draws h100.png: our models beside timm's ViT of the same width.
# About ten minutes on one GPU; rows that are there already are measured again.
set -euo pipefail
cd "$(dirname "$0")"

bench() { # models and options: at the four sizes, appended to one file
    python -m fastvim.cli benchmark "$@" --dtype bfloat16 \
        --size 224 512 1024 2048 --batch 128 32 8 2 --out h100.json --append
}

rm -f h100.json
for size in tiny small base; do
    bench "fastvim_${size}_patch16_224" "vit_${size}_patch16_224" --mode graph
    bench "vit_${size}_patch16_224" --mode compiled-graph
done
bench vim_tiny_patch16_224 --mode graph
python -m fastvim.cli benchmark fastvim_tiny_patch16_224 vit_tiny_patch16_224 --dtype bfloat16 \
    --size 224 --batch 1 --mode graph compiled-graph --out h100.json --append
python -m fastvim.cli benchmark fastvim_tiny_patch16_224 vit_tiny_patch16_224 --dtype bfloat16 \
    --size 224 --batch 128 --mode eager compiled --out h100.json --append
python -m fastvim.cli benchmark --from h100.json --markdown --plot h100.png
