#!/usr/bin/env bash
# Tests, sanitizer and benchmarks on a machine with a CUDA GPU and without network.
#
#     benchmarks/gpu/run.sh [--out DIR] [--rehearse] [STAGE...]
#
# Stages: tests, sanitize, bench-small, bench-large, bench-linear, variants, steps, options, profile,
# cifar100; all if none is named.
# README.md beside this says what each does, what is written, and which fit into ten minutes.
# Exit code: 0, 1 if a stage failed or ran out of time, 2 if nothing could be run, 3 if all passed
# and cifar100 is to be continued.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 2

ALL=(tests sanitize bench-small bench-large bench-linear variants steps options profile cifar100)
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-570} # seconds for all stages together
WORKERS=${WORKERS:-8}
out=${OUT:-runs/gpu}
rehearsing=
stages=()

usage() {
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
}

while (($#)); do
    case $1 in
        --out)
            out=${2:?--out needs a folder}
            shift
            ;;
        --rehearse) rehearsing=1 ;;
        -h | --help)
            usage
            exit 0
            ;;
        *)
            if [[ " ${ALL[*]} " != *" $1 "* ]]; then
                echo "run.sh: no stage is called $1: use ${ALL[*]}" >&2
                exit 2
            fi
            stages+=("$1")
            ;;
    esac
    shift
done
((${#stages[@]})) || stages=("${ALL[@]}")

if ! "$PYTHON" -c 'import torch' 2>/dev/null; then
    echo "run.sh: $PYTHON has no torch: set PYTHON to one that has" >&2
    exit 2
fi
if [[ $rehearsing ]]; then
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_VISIBLE_DEVICES=
elif ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "run.sh: there is no CUDA device here; --rehearse runs what a CPU can" >&2
    exit 2
fi

mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
kit=${DALI_KIT:-runs/dali_kit.tar.xz} # of make_dali_kit.py: NVIDIA DALI where it is not installed
[[ -f $kit ]] && at=$(mktemp -d) && tar xf "$kit" -C "$at" && PYTHONPATH+=:$at
started=$SECONDS
summary=()
failed=0
unfinished=0

# stage NAME SECONDS LOG COMMAND...: run it within its own limit and what is left of LIMIT.
stage() {
    local name=$1 limit=$2 log=$out/$3 begun=$SECONDS left status
    shift 3
    left=$((LIMIT - (SECONDS - started)))
    ((limit = limit < left ? limit : left))
    printf '\n=== %s (at most %d s)\n' "$name" "$((limit > 0 ? limit : 0))"
    if ((limit < 10)); then
        summary+=("$name: not started, the $LIMIT s were up")
        failed=1
        return 1
    fi
    printf '=== %s\n' "$name" >>"$log"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
    case $status in
        3)
            summary+=("$name: unfinished, call again")
            unfinished=3
            return 3
            ;;
        0) summary+=("$name: passed, $((SECONDS - begun)) s") ;;
        124 | 137) summary+=("$name: OUT OF TIME after $limit s, see ${log##*/}") ;;
        *) summary+=("$name: FAILED with exit code $status, see ${log##*/}") ;;
    esac
    ((status == 0)) || failed=1
    return "$status"
}

machine() {
    date -u +%Y-%m-%dT%H:%M:%SZ
    uname -srm
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit \
        --format=csv 2>/dev/null || echo "nvidia-smi: not here"
    "$PYTHON" - <<'PYTHON_CODE'
import platform
from importlib.metadata import PackageNotFoundError, version

print("python", platform.python_version())
for name in ("torch", "triton", "numpy", "pybind11", "pytest", "liger-kernel", "quack-kernels",
             "nvidia-ml-py", "timm"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "not installed")
PYTHON_CODE
}

# The extension, for tests that rank; the kernels do without it.
build() {
    if "$PYTHON" -c 'import dml_fast._native' 2>/dev/null; then
        echo "dml_fast._native is there"
    elif ! command -v c++ >/dev/null; then
        echo "no C++ compiler: dml_fast._native is not built"
    elif ! "$PYTHON" -c 'import pybind11' 2>/dev/null; then
        echo "no pybind11: dml_fast._native is not built"
    elif "$PYTHON" setup.py -q build_ext --inplace; then
        echo "dml_fast._native is built"
    else
        echo "dml_fast._native: the build failed"
    fi
}

# The tests marked gpu, and those of the kernels and of the loss, which run compiled here.
run_tests() {
    local files options=(-q --durations=5 -p no:cacheprovider --tb=short --show-capture=no -W ignore)
    if [[ $rehearsing ]]; then
        files=(tests/kernels/test_gpu.py tests/kernels/test_availability.py tests/engine/test_streams.py
            tests/engine/test_streams_gpu.py)
    else
        export DML_FAST_REQUIRE=gpu
        mapfile -t files < <(
            {
                grep -rl --include='test_*.py' 'mark\.gpu' tests
                ls tests/kernels/test_*.py tests/loss/test_*.py
            } | grep -v tests/kernels/test_aot | sort -u # which compiles for other GPUs
        )
    fi
    if "$PYTHON" -c 'import xdist' 2>/dev/null; then
        options+=(-n "$WORKERS") # Triton compiles most of the time
    fi
    stage tests 400 tests.log "$PYTHON" -m pytest "${options[@]}" "${files[@]}"
}

find_sanitizer() {
    command -v compute-sanitizer || compgen -G '/usr/local/cuda*/bin/compute-sanitizer' | head -n 1
}

run_sanitize() {
    local driver=benchmarks.gpu.sanitize parts=16 tool sanitizer
    if [[ $rehearsing ]]; then
        stage "sanitize: interpreted" 300 sanitize.log "$PYTHON" -m $driver --part 0/12
        return
    fi
    # Compile first, side by side; then each tool finds the kernels in the cache.
    stage "sanitize: compile" 150 sanitize.log bash -c \
        "seq 0 $((parts - 1)) | xargs -P $WORKERS -I{} '$PYTHON' -m $driver --part {}/$parts"
    sanitizer=$(find_sanitizer)
    if [[ ! $sanitizer ]]; then
        summary+=("sanitize: compute-sanitizer is not installed here")
        return
    fi
    for tool in memcheck racecheck initcheck synccheck; do
        # Without its cache PyTorch asks the driver for each tensor, so the tool knows their bounds.
        stage "sanitize: $tool" 200 sanitize.log env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            "$sanitizer" --tool "$tool" --error-exitcode 1 --print-limit 20 "$PYTHON" -m $driver
    done
}

# The most important first: what is compiled takes minutes, and the time may be up.
CIFAR=(4x128x100 4x128x10 2x128x100 8x128x100)
LARGE=(4x4096x32768 4x1024x1000 1x4096x32768 2x2048x131072 4x8192x1000)

run_bench() { # NAME SHAPE...
    local name=$1 options=(--budget 2 --time-limit 300)
    shift
    if [[ $rehearsing ]]; then
        options=(--budget 0.2 --dtype float32 --contestants naive careful "careful + max-autotune"
            liger quack closed_form native triton)
        set -- 2x16x10 1x16x10
    fi
    stage "$name" 560 bench.log "$PYTHON" -m benchmarks.bench_loss --shapes "$@" \
        --json "$out/$name.json" "${options[@]}"
}

run_bench_linear() {
    local options=()
    [[ ! $rehearsing ]] || options=(--shape 2x16x64x8 --budget 0.2 --alone naive careful)
    stage bench-linear 200 bench.log "$PYTHON" -m benchmarks.bench_linear_loss \
        --json "$out/bench-linear.json" "${options[@]}"
}

# Launches that only a GPU can choose between.
run_variants() {
    local options=()
    [[ ! $rehearsing ]] || options=(--rehearse --budget 0.1)
    stage variants 400 variants.log "$PYTHON" -m benchmarks.gpu.variants --json "$out/variants.json" \
        "${options[@]}"
}

# What each option of training adds to a step.
run_options() {
    local options=(--budget 60)
    [[ ! $rehearsing ]] || options=(--arch resnet8 --batch 8 --budget 0.5)
    stage options 200 options.log "$PYTHON" -m benchmarks.bench_options --json "$out/options.json" \
        "${options[@]}"
}

# The whole step: our executors beside the naive loop and an engineer's hour, side by side.
run_steps() {
    local options=(--arch resnet32 mobilenet_v1 --budget 40 --compile)
    [[ ! $rehearsing ]] || options=(--arch resnet8 --students 2 --batch 8 --budget 0.5)
    stage steps 560 steps.log "$PYTHON" -m benchmarks.bench_step --json "$out/steps.json" \
        "${options[@]}"
}

# Launches, kernels by kind, the share of time in which the GPU works, how far students overlap.
run_profile() {
    local options=()
    [[ ! $rehearsing ]] || options=(--arch resnet8 --students 2 --batch 8)
    stage profile 240 profile.log "$PYTHON" -m benchmarks.gpu.profile_step \
        --json "$out/profile.json" "${options[@]}"
}

# Real CIFAR-100, in legs: README.md says how its parts and its state travel.
run_cifar100() {
    local left=$((LIMIT - (SECONDS - started) - 10)) options=()
    [[ ! $rehearsing ]] || options=(--rehearse --work "$out/cifar100")
    stage cifar100 "$LIMIT" cifar100.log "$PYTHON" -m benchmarks.gpu.cifar100 --out "$out" \
        --limit "$left" "${options[@]}"
}

{
    machine
    build
} 2>&1 | tee "$out/machine.txt"
reports=()
for name in "${stages[@]}"; do
    rm -f "$out/${name%%-*}.log" "$out/$name.json" # of an earlier run
    [[ $name != bench-* ]] || reports+=("$out/$name.json")
done
for name in "${stages[@]}"; do
    case $name in
        tests) run_tests ;;
        sanitize) run_sanitize ;;
        bench-small) run_bench "$name" "${CIFAR[@]}" ;;
        bench-large) run_bench "$name" "${LARGE[@]}" ;;
        bench-linear) run_bench_linear ;;
        variants) run_variants ;;
        steps) run_steps ;;
        options) run_options ;;
        profile) run_profile ;;
        cifar100) run_cifar100 ;;
    esac
done

{
    printf '\n=== summary, %d s, results in %s\n' "$((SECONDS - started))" "$out"
    printf '%s\n' "${summary[@]}"
    "$PYTHON" -m benchmarks.common.loss_summary "${reports[@]}"
    for name in variants steps options profile; do
        [[ " ${stages[*]} " != *" $name "* ]] || grep -E '^(\||[0-9]+ x |profile of |Before and after)' "$out/$name.log"
    done
} 2>&1 | tee "$out/summary.txt"
exit $((failed ? failed : unfinished))
