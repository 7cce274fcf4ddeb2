#!/usr/bin/env bash
# The GPU column of docs/performance.md, in at most nine minutes a part; needs one NVIDIA GPU, this checkout, and a
# Python with what requirements.txt names, and for the comparison PyTorch and timm.
#
#     [PYTHON=python3] [PEER=python3] benchmarks/gpu.sh [first|table|choose|rest] [FOLDER]
#
# first:  ConViT-S trained in the way that should be the best (best, below), next to the plain network in the same way, timm's,
#         and ours as it is; inference; where a step's time goes.   table: every row of the table of targets.
# choose: the other ways, and forms of one layer's attention.   rest: ConViT-Ti, ConViT-B, 448 px, the loop.
# What matters most comes first; each result is printed and written when it is there. FOLDER gets PART.log, with all
# that is printed, and JSON. What there was no time or no package for is said. TINY=1 tries the script on any machine.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:-first} out=$(realpath -m "${2:-gpu-results}") python=${PYTHON:-python3} peer=${PEER:-python3}
limit=540 # seconds for all

# step SECONDS COMMAND...: run it, at most so long, and never beyond the limit.
step() {
    local most=$1 left=$((limit - SECONDS))
    shift
    if [ "$left" -lt 30 ]; then
        echo "No time left for: $*"
        return
    fi
    echo "--- $* (after $SECONDS s)"
    timeout --kill-after=5 "$((left < most ? left : most))" "$@" || echo "It ended with $?."
}

# model SECONDS NAME BATCH MODEL ARGUMENTS...: benchmarks.model, which starts nothing in its last 20 seconds.
model() {
    local most=$1 name=$2 batch=$3 model=$4 left=$((limit - SECONDS))
    shift 4
    step "$most" "$python" -m benchmarks.model --models="$model" --batch="$batch" --fresh --rounds=1 \
        --seconds="$seconds" --settings="$settings" --json="$out/$name.json" ${compare:+"$compare"} \
        --minutes="$(awk -v s="$(((left < most ? left : most) - 20))" 'BEGIN { print (s > 0 ? s / 60 : 0) }')" "$@"
}

where() {
    # Without command buffers, whose operations have no names in a profile.
    step 150 env XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=" "$python" -m benchmarks.where \
        --batch="$full" --settings="$best_settings" --image_size="$size" --steps="$steps"
}

train_loop() {
    step 140 "$python" -m benchmarks.loop --config=configs/convit_s.py --rounds=1 --config.batch_size="$full" \
        --config.mesh.data=1 --config.model.attention=cudnn --json="$out/loop.json" "${loop[@]}"
}

lacking() { # lacking PYTHON PACKAGE...: those of the packages that it does not have
    "$1" -c 'import re, sys
from importlib.metadata import distributions
names = (each.metadata["Name"] for each in distributions())
have = {re.sub("[-_.]+", "-", name).lower() for name in names if name}
print(*(name for name in sys.argv[1:] if name not in have))' "${@:2}"
}

measure() {
    local no_model no_where no_loop no_peer
    if [ -z "${TINY:-}" ] && ! nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader; then
        echo "There is no NVIDIA GPU: TINY=1 tries the script without."
        return 1
    fi
    no_model=$(lacking "$python" jax flax optax) || return 1
    if [ -n "$no_model" ]; then
        echo "Nothing can run: $python has no $no_model."
        return 1
    fi
    "$python" -c 'import sys; from importlib.metadata import version as v
print("Python", sys.version.split()[0], *(f"{name} {v(name)}" for name in ("jax", "jaxlib", "flax", "optax")))'
    no_where=$(lacking "$python" ml-collections scikit-learn pillow)
    no_loop=$(lacking "$python" absl-py array-record google-crc32c grain matplotlib ml-collections orbax-checkpoint \
        pillow portpicker tensorboardx tqdm)
    no_peer=$(lacking "$peer" torch timm) || no_peer="torch timm"
    local not_run=
    [ -z "$no_where" ] || not_run+=" where a step's time goes: $no_where;"
    [ -z "$no_loop" ] || not_run+=" the training loop: $no_loop;"
    [ -z "$no_peer" ] || not_run+=" the comparison with timm: $no_peer;"
    [ -z "$not_run" ] || echo "Not run, until what it lacks is installed:${not_run%;}."
    compare=
    [ -n "$no_peer" ] || compare="--peer=$peer"

    case $part in
    first)
        # The best twice: its first step is cold in the first turn, and warm in the second.
        model 410 training "$full" "convit_small@$size" --tasks=training --programs="convit: $best,plain: $best,\
timm convit,convit,convit: cuDNN,timm convit compiled,convit: $best"
        model 110 inference "$full" "convit_small@$size" --tasks=inference \
            --programs="convit: cuDNN,plain: cuDNN,timm convit,convit"
        [ -n "$no_where" ] || where
        ;;
    table)
        model 330 table "$full" "convit_small@$size" --tasks=training,inference \
            --programs="convit: $best,plain: $best,timm convit,convit: $best,timm convit compiled"
        [ -n "$no_loop" ] || train_loop
        model 100 large "$large_batch" "convit_small@$large" --tasks=training,inference \
            --programs="convit: $best,plain: $best"
        ;;
    choose)
        model 320 ways "$full" "convit_small@$size" --tasks=training --programs="convit: cuDNN,plain: cuDNN,convit,plain,\
convit: position dense,convit: position over heads only,convit: unrolled,convit: remat"
        for shape in $shapes; do
            step 70 "$python" -m benchmarks.attention --shape="$shape" --dtype="$dtype" \
                --json="$out/attention-${shape//,/x}.json"
        done
        ;;
    rest)
        model 140 tiny "$ti" "convit_tiny@$size" --tasks=training,inference \
            --programs="convit: $best,plain: $best,timm convit"
        model 140 base "$b" "convit_base@$size" --tasks=training,inference \
            --programs="convit: $best,plain: $best,timm convit"
        model 120 large "$large_batch" "convit_small@$large" --tasks=training,inference \
            --programs="convit: $best,plain: $best"
        [ -n "$no_loop" ] || train_loop
        ;;
    esac
    echo "$SECONDS s; all of it in $out"
}

case $part in first | table | choose | rest) ;; *)
    echo "There are first, table, choose and rest; this was $part."
    exit 1
    ;;
esac
best="cuDNN + unrolled" # of WAYS in benchmarks/model.py
if [ -n "${TINY:-}" ]; then
    settings='{"depth": 3, "local_up_to_layer": 2, "embed_dim": 32, "num_heads": 4, "dtype": "bfloat16"}'
    best_settings=${settings/\}/, \"attention\": \"cudnn\", \"scan_unroll\": 3\}}
    dtype=float32 shapes="2,16,4,8 2,17,4,8" size=32 large=64 full=2 large_batch=2 ti=2 b=2 seconds=0.01 steps=2
    loop=(--config.model.embed_dim=32 --config.model.num_heads=4 --config.model.depth=3 --config.model.local_up_to_layer=2
        --config.model.image_size=32 --config.model.scan_unroll=3 --config.steps=6 --config.log_every=2)
else
    settings='{"dtype": "bfloat16"}' best_settings='{"dtype": "bfloat16", "attention": "cudnn", "scan_unroll": 12}'
    dtype=bfloat16 shapes="256,196,9,48 256,197,9,48 256,196,12,64"
    size=224 large=448 full=512 large_batch=64 ti=1024 b=256 seconds=3 steps=10
    loop=(--config.model.scan_unroll=12 --config.steps=80 --config.log_every=20)
    export JAX_PLATFORMS=cuda,cpu # no GPU is then an error, where JAX would go on without
fi
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1
mkdir -p "$out"
measure 2>&1 | tee "$out/$part.log"
