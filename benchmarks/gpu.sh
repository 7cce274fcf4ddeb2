#!/usr/bin/env bash
# The GPU column of docs/performance.md, in at most nine minutes a call; needs one NVIDIA GPU, this checkout, and a
# Python with what requirements.txt names, and for the comparison PyTorch and timm.
#
#     [PYTHON=python3] [PEER=python3] benchmarks/gpu.sh [first|rest] [FOLDER]
#
# first: forms of attention, ConViT-S with all comparisons, the loop.   rest: the other models.
# Tables are printed, JSON lies in FOLDER. What there is no time for is said. TINY=1 tries the script on any machine.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:-first} out=$(realpath -m "${2:-gpu-results}") python=${PYTHON:-python3} peer=${PEER:-python3}
mkdir -p "$out"
export XLA_PYTHON_CLIENT_PREALLOCATE=false
limit=510 # seconds until nothing new is started
left() { awk -v s="$((limit - SECONDS))" -v most="$1" 'BEGIN { m = s / 60; print m < most ? (m > 0 ? m : 0) : most }'; }

if [ -n "${TINY:-}" ]; then
    settings='{"depth": 3, "local_up_to_layer": 2, "embed_dim": 16, "num_heads": 4}'
    dtype=float32 shape=2,16,4,8 batch=2 small=convit_small@32 rest=convit_tiny@32,convit_small@64 rest_batch=2,2 seconds=0.01
    loop=(--config.model.embed_dim=16 --config.model.num_heads=4 --config.model.depth=3 --config.model.local_up_to_layer=2
        --config.model.image_size=32 --config.model.dtype=float32)
    steps=6 every=2
else
    memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -1)
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
    batch=$([ "$memory" -gt 120000 ] && echo 512 || echo 256) # timm's ConViT-S keeps every map for its gradient
    settings='{"dtype": "bfloat16"}' dtype=bfloat16 shape=256,196,9,48 small=convit_small@224 seconds=3
    rest=convit_small@448,convit_base@224,convit_tiny@224 rest_batch=64,256,1024 loop=() steps=80 every=20
fi
"$python" -c 'import jax; print("jax", jax.__version__, *jax.devices())'
peers=()
if "$peer" -c 'import timm, torch' 2>/dev/null; then
    peers=(--peer="$peer" --peers="timm convit,timm convit compiled,timm deit")
else
    echo "No PyTorch with timm in $peer: no comparison."
fi

if [ "$part" = first ]; then
    timeout 90 "$python" -m benchmarks.attention --shape="$shape" --dtype="$dtype" --json="$out/attention.json"
    timeout "$((limit - SECONDS + 20))" "$python" -m benchmarks.model --models="$small" --batch="$batch" --rounds=2 \
        --seconds="$seconds" --settings="$settings" --fresh --minutes="$(left 5.5)" "${peers[@]}" --json="$out/small.json"
    "$python" -c 'import benchmarks.loop' || echo "The loop needs all of requirements.txt: not measured."
    timeout "$((limit - SECONDS + 20))" "$python" -m benchmarks.loop --config=configs/convit_s.py --rounds=1 \
        --config.batch_size="$batch" --config.steps="$steps" --config.log_every="$every" --config.mesh.data=1 \
        --json="$out/loop.json" "${loop[@]}"
    if [ "$batch" != 512 ] && [ -z "${TINY:-}" ]; then # the MFU asked for is that of batch 512
        timeout "$((limit - SECONDS + 20))" "$python" -m benchmarks.model --models="$small" --batch=512 --tasks=training \
            --rounds=1 --seconds="$seconds" --settings="$settings" --fresh --minutes="$(left 2)" --json="$out/mfu.json"
    fi
else
    timeout "$((limit - SECONDS + 20))" "$python" -m benchmarks.model --models="$rest" --batch="$rest_batch" --rounds=1 \
        --seconds="$seconds" --settings="$settings" --fresh --minutes="$(left 9)" --json="$out/rest.json"
fi
echo "$SECONDS s; JSON in $out"
