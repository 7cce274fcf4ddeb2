#!/usr/bin/env bash
# Measures on one NVIDIA GPU, in at most nine minutes a part. PYTHON has the packages of requirements.txt, PEER
# PyTorch and timm.
#
#     [PYTHON=python3] [PEER=python3] benchmarks/gpu.sh first|sizes|loop [FOLDER]
#
# first: ConViT-S at batch 512, training and inference: each form, plain attention in the same form, and timm's ConViT and
#        DeiT, eager and compiled.
# sizes: ConViT-Ti, ConViT-B, and ConViT-S at 448 px, in the form that should be the fastest.
# loop:  the training loop against the bare step, then agreement with timm.
#
# Every result is printed and written to FOLDER as soon as it exists, the most important first; a program without time or
# packages is named. TINY=1 tries the script on any machine.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:-first} out=$(realpath -m "${2:-gpu-results}") python=${PYTHON:-python3} peer=${PEER:-python3}
limit=540 # seconds
best=cudnn+unrolled
if [ -n "${TINY:-}" ]; then
    shape='"depth": 3, "local_up_to_layer": 2, "embed_dim": 32, "num_heads": 4'
    settings="{$shape, \"dtype\": \"bfloat16\"}" small=32 large=64 batches=(2 2 2 2) seconds=0.01
    loop=(--config.batch_size=2 --config.model.embed_dim=32 --config.model.num_heads=4 --config.model.depth=3
        --config.model.local_up_to_layer=2 --config.model.image_size=32 --config.steps=6 --config.log_every=2)
else
    settings='{"dtype": "bfloat16"}' small=224 large=448 batches=(512 1024 256 64) seconds=3
    loop=(--config.batch_size=512 --config.steps=80 --config.log_every=20)
    export JAX_PLATFORMS=cuda,cpu # without a GPU this is an error
fi
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1

# model SECONDS NAME MODEL BATCH PROGRAMS: benchmarks.model, which keeps its own time.
model() {
    local left=$((limit - SECONDS))
    local most=$((left < $1 ? left : $1))
    "$python" -m benchmarks.model --models="$3" --batch="$4" --programs="$5" --tasks=training,inference --rounds=2 \
        --seconds="$seconds" --settings="$settings" --json="$out/$2.json" ${compare:+"$compare"} \
        --minutes="$(awk -v s="$most" 'BEGIN { print (s > 0 ? s / 60 : 0) }')"
}

measure() {
    if [ -z "${TINY:-}" ]; then
        nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || return 1
    fi
    "$python" -c 'import jax, flax, optax; print("jax", jax.__version__, "flax", flax.__version__)' || return 1
    compare=
    if "$peer" -c 'import torch, timm; print("torch", torch.__version__, "timm", timm.__version__)'; then
        compare="--peer=$peer"
    else
        echo "timm is not measured: $peer cannot import torch and timm."
    fi
    case $part in
    first)
        model 540 first "convit_small@$small" "${batches[0]}" "convit+$best,plain+$best,timm-convit,convit,plain,\
timm-convit+compiled,convit+cudnn,plain+cudnn,convit+unrolled,plain+unrolled,convit+remat,timm-deit,timm-deit+compiled"
        ;;
    sizes)
        programs="convit+$best,plain+$best,timm-convit,timm-convit+compiled"
        model 180 tiny "convit_tiny@$small" "${batches[1]}" "$programs"
        model 180 base "convit_base@$small" "${batches[2]}" "$programs"
        model 180 large "convit_small@$large" "${batches[3]}" "$programs"
        ;;
    loop)
        timeout 300 "$python" -m benchmarks.loop --config=configs/convit_s.py --rounds=2 --config.mesh.data=1 \
            --config.model.attention=cudnn --config.model.scan_unroll=12 --json="$out/loop.json" "${loop[@]}" ||
            echo "benchmarks.loop ended with $? (124: no time left)."
        [ -z "$compare" ] || timeout 240 "$python" -m benchmarks.parity "$compare" --models=convit_tiny,convit_small
        ;;
    esac
    echo "$SECONDS s; results in $out"
}

case $part in first | sizes | loop) ;; *)
    echo "There is no part $part: give first, sizes or loop." >&2
    exit 1
    ;;
esac
mkdir -p "$out"
measure 2>&1 | tee "$out/$part.log"
