#!/usr/bin/env bash
# All measurements on an accelerator, in under seven minutes: whether attention is correct, then speed, the most important
# first.
#
#   benchmarks/gpu.sh            # -> results/<device>.json, and its tables in docs/performance.md
#   benchmarks/gpu.sh --small    # the same on a CPU with small models, as a test of itself
#
# Needs no data set and no network. If a part fails, the others still run; parts that do not fit into LIMIT seconds are
# skipped. Both are `skipped` lines of the results. With LIMIT=1200 all parts run.
#
# PYTHON, VIT_JAX_TORCH_PYTHON: interpreters (python3). RESULTS, PAGE: directory and page of the results. LIMIT: total
# seconds (400).
set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
export VIT_JAX_TORCH_PYTHON=${VIT_JAX_TORCH_PYTHON:-$PYTHON} XLA_PYTHON_CLIENT_PREALLOCATE=false
RESULTS=${RESULTS:-results} PAGE=${PAGE:-docs/performance.md} LIMIT=${LIMIT:-400}
lines=$(mktemp)
trap 'rm -f "$lines"' EXIT

# part MAXIMUM SCRIPT ARGUMENTS...: runs a benchmark for at most MAXIMUM seconds.
part() {
    local maximum=$1 left=$((LIMIT - SECONDS)) status=timeout
    shift
    if ((left > 10)); then
        timeout --kill-after=5 $((maximum < left ? maximum : left)) "$PYTHON" "benchmarks/$1" "${@:2}" | tee -a "$lines"
        status=${PIPESTATUS[0]}
    fi
    [[ $status == 0 ]] || echo "{\"benchmark\": \"skipped\", \"command\": \"$*\", \"status\": \"$status\"}" | tee -a "$lines"
}

if [[ ${1:-} == --small || -n ${SMALL:-} ]]; then
    model=(--variant=Ti/8 --depth=1 --image_size=16)
    part 120 kernels.py --check --widths=64 --rows=256 --tokens=4,5 --dtypes=float32
    part 300 train_step.py "${model[@]}" --batch_size=4 --dtypes=float32 --sides=ours,ours_trainer --turns=2 --steps=1
    part 300 end_to_end.py --config=configs/digits.py --steps=20 --turns=1 --config.model.width=16 --config.model.heads=2
    part 120 breakdown.py "${model[@]}" --batch_size=4 --steps=2
    part 120 kernels.py --widths=64 --rows=256 --tokens=5 --dtypes=float32 --seconds=0.01
    part 120 memory.py "${model[@]}" --batch_sizes=4 --remat=none,full
    part 120 inference.py "${model[@]}" --batch_sizes=1 --dtypes=float32 --sides=ours --turns=1 --calls=3
else
    step=(--dtypes=bfloat16 --turns=5 --seconds=1 --sides=ours_trainer,timm_compile)
    b16=(--variant=B/16 --image_size=224 --batch_size=256 --classes=1000)
    s4=(--variant=S/4 --image_size=32 --batch_size=1024 --classes=10)
    part 60 kernels.py --check --widths=384 --rows=16384 --tokens=64,65,197,200 --dtypes=bfloat16
    part 120 train_step.py "${b16[@]}" "${step[@]}"
    part 110 train_step.py "${s4[@]}" "${step[@]}"
    part 90 end_to_end.py --only=speed --images=10240 --steps=400 --turns=1 --config=configs/cifar10.py:lite \
        --config.train.batch_size=512
    part 60 breakdown.py "${b16[@]}" --dtype=bfloat16
    part 60 breakdown.py "${s4[@]}" --dtype=bfloat16
    part 75 kernels.py --widths=384,768 --seconds=0.05 --dtypes=bfloat16
    # Skipped unless LIMIT is raised.
    part 60 inference.py --variant=S/16 --image_size=224 --dtypes=bfloat16 --sides=ours,timm --turns=3 --seconds=0.5
    part 100 train_step.py --variant=S/16 --image_size=224 --batch_size=512 --classes=1000 "${step[@]}"
    part 150 train_step.py --variant=L/16 --image_size=224 --batch_size=128 --classes=1000 "${step[@]}"
    part 150 end_to_end.py --images=2048 --image_size=224 --steps=160 --turns=1 --config=configs/cifar10.py \
        --config.model.variant=B/16 --config.model.depth=12 --config.model.heads=12 --config.model.mlp_width=3072 \
        --config.train.batch_size=256
fi
"$PYTHON" benchmarks/table.py put "$("$PYTHON" benchmarks/table.py collect "$lines" "$RESULTS")" "$PAGE"
echo "$SECONDS s"
