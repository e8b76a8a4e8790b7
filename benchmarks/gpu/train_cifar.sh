#!/usr/bin/env bash
# Trains two ResNet-32, mutually and independently, in legs of under ten minutes.
#
#     benchmarks/gpu/train_cifar.sh cifar100:DIR [OPTION...]
#
# Call it again until it says that all is done: each leg continues from the last one's checkpoint.
# OPTIONs go to `python -m dml_fast.train` at the start of each run. $OUT (default runs/gpu) takes the
# runs, $SEED (0), $LIMIT (570 seconds a leg) and $PYTHON are read too. DIR is prepared beforehand:
# `python -m dml_fast.train --data cifar100:DIR --download` on a machine with network, then copied.
# Exit code: 0 all done, 3 call again, otherwise the code with which a run failed.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 2

if (($# == 0)) || [[ $1 == -h || $1 == --help ]]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
    exit 2
fi
data=$1
shift
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-570}
SEED=${SEED:-0}
out=${OUT:-runs/gpu}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# the paper's recipe (Zhang et al. 2018, section 3.2)
recipe=(--data "$data" --arch resnet32 --cohort 2 --amp --epochs 200 --batch-size 64 --lr 0.1
    --schedule paper --warmup 0 --save-every 60s --seed "$SEED")
started=$SECONDS
runs=()
waiting=()
for method in dml independent; do
    run=$out/cifar-$method-s$SEED
    runs+=("$run")
    [[ -e $run/curves.png ]] || waiting+=("$method") # written last
done

while ((${#waiting[@]})); do
    method=${waiting[0]}
    run=$out/cifar-$method-s$SEED
    left=$(((LIMIT - (SECONDS - started)) / ${#waiting[@]})) # each gets its share of the leg
    ((left >= 20)) || break
    if [[ -e $run/config.json ]]; then
        command=(--resume "$run")
    else
        command=(--out "$run" --method "$method" "${recipe[@]}" "$@")
    fi
    # SIGTERM: it finishes the step, saves, and ends with 143; timeout says 124
    timeout --signal=TERM --kill-after=30 $((left - 5)) "$PYTHON" -m dml_fast.train "${command[@]}"
    status=$?
    if ((status != 0 && status != 124 && status != 143)); then
        echo "train_cifar.sh: $method ended with exit code $status" >&2
        exit "$status"
    fi
    waiting=("${waiting[@]:1}")
done

unfinished=0
for run in "${runs[@]}"; do
    if [[ -e $run/metrics.jsonl ]]; then
        echo "$run: $(wc -l <"$run/metrics.jsonl") epochs; last: $(tail -n 1 "$run/metrics.jsonl")"
    fi
    [[ -e $run/curves.png ]] || unfinished=1
done
if ((unfinished)); then
    echo "not done: call this again to continue"
    exit 3
fi
echo "all done: python -m dml_fast.report ${runs[*]}"
