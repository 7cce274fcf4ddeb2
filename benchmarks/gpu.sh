#!/usr/bin/env bash
# The GPU column of docs/performance.md, in at most nine minutes a call; needs one NVIDIA GPU, this checkout, and a
# Python with what requirements.txt names, and for the comparison PyTorch and timm.
#
#     [PYTHON=python3] [PEER=python3] benchmarks/gpu.sh [table|choose|rest] [FOLDER]
#
# table: every row of the table of targets, for ConViT-S.   choose: forms of attention, ConViT in other ways, where a
# step's time goes, what augmentation costs.   rest: ConViT-Ti, ConViT-B.
# Tables are printed, JSON lies in FOLDER. What there is no time for is said. TINY=1 tries the script on any machine.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:-table} out=$(realpath -m "${2:-gpu-results}") python=${PYTHON:-python3} peer=${PEER:-python3}
mkdir -p "$out"
export XLA_PYTHON_CLIENT_PREALLOCATE=false
limit=520 # seconds for all

# step SECONDS COMMAND...: run it, at most so long, and never beyond the limit.
step() {
    local most=$1 left=$((limit - SECONDS))
    shift
    if [ "$left" -lt 30 ]; then
        echo "No time left for: $*"
        return
    fi
    local words="$*"
    echo "--- ${words#"$python" -m } (after $SECONDS s)"
    timeout "$((left < most ? left : most))" "$@" || echo "It ended with $?."
}
model() { # model SECONDS NAME ARGUMENTS...: benchmarks.model, which starts nothing in its last 20 seconds
    local most=$1 name=$2
    shift 2
    local minutes=$(((most < limit - SECONDS ? most : limit - SECONDS) - 20))
    step "$most" "$python" -m benchmarks.model --fresh --seconds="$seconds" --settings="$settings" \
        --minutes="$(awk -v s="$minutes" 'BEGIN { print (s > 0 ? s / 60 : 0) }')" --json="$out/$name.json" "$@"
}

if [ -n "${TINY:-}" ]; then
    settings='{"depth": 3, "local_up_to_layer": 2, "embed_dim": 16, "num_heads": 4}'
    dtype=float32 shapes="2,16,4,8 2,17,4,8" size=32 large=64 full=2 batch=2 large_batch=2 ti=2 b=2 seconds=0.01
    loop=(--config.model.embed_dim=16 --config.model.num_heads=4 --config.model.depth=3 --config.model.local_up_to_layer=2
        --config.model.image_size=32 --config.model.dtype=float32 --config.steps=6 --config.log_every=2)
else
    command -v nvidia-smi >/dev/null || { echo "There is no nvidia-smi, so no GPU: TINY=1 tries the script."; exit 1; }
    memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -1)
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
    batch=$([ "$memory" -gt 120000 ] && echo 512 || echo 256) # timm's ConViT-S keeps every map for its gradient
    settings='{"dtype": "bfloat16"}' dtype=bfloat16 shapes="256,196,9,48 256,197,9,48 256,196,12,64"
    size=224 large=448 full=512 large_batch=64 ti=1024 b=256 seconds=3
    loop=(--config.steps=80 --config.log_every=20)
fi
"$python" -c 'import jax; print("jax", jax.__version__, *jax.devices())' || exit 1
compare=
if "$peer" -c 'import timm, torch' 2>/dev/null; then
    compare="--peer=$peer"
else
    echo "No PyTorch with timm in $peer: no comparison."
fi

case $part in
table)
    # Training first: its first step is then cold in the first round, and warm in the second.
    model 200 small --models="convit_small@$size" --batch="$full" --rounds=2 --tasks=training,inference --programs=convit,plain
    if [ -n "$compare" ]; then
        model 200 timm --models="convit_small@$size" --batch="$batch" --rounds=1 "$compare" \
            --programs="convit,timm convit,timm convit compiled"
    fi
    model 90 large --models="convit_small@$large" --batch="$large_batch" --rounds=1 --programs=convit,plain
    if "$python" -c 'import benchmarks.loop'; then
        step 150 "$python" -m benchmarks.loop --config=configs/convit_s.py --rounds=1 --config.batch_size="$full" \
            --config.mesh.data=1 --json="$out/loop.json" "${loop[@]}"
    else
        echo "The loop needs all of requirements.txt: not measured."
    fi
    ;;
choose)
    model 330 ways --models="convit_small@$size" --batch="$full" --rounds=1 --tasks=training \
        --programs="convit,convit: cuDNN,convit: position over heads only,convit: position dense,convit: unrolled,convit: remat"
    step 60 "$python" -m benchmarks.where --batch="$full" --settings="$settings" --image_size="$size"
    for shape in $shapes; do
        step 80 "$python" -m benchmarks.attention --shape="$shape" --dtype="$dtype" --json="$out/attention-$shape.json"
    done
    ;;
rest)
    model 260 tiny --models="convit_tiny@$size" --batch="$ti" --rounds=1 --programs="convit,plain,timm convit" ${compare:+"$compare"}
    model 260 base --models="convit_base@$size" --batch="$b" --rounds=1 --programs="convit,plain,timm convit" ${compare:+"$compare"}
    ;;
*)
    echo "There are table, choose and rest; this was $part."
    exit 1
    ;;
esac
echo "$SECONDS s; JSON in $out"
