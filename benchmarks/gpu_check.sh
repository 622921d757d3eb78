#!/usr/bin/env bash
# Builds, tests and measures on a machine with one GPU, in under nine minutes and without a network.
#
#   benchmarks/gpu_check.sh                 records go to benchmarks/results/<device>/
#   OUT=folder benchmarks/gpu_check.sh      records and the log go to folder
#
# Every stage has its own limit, and a stage that fails or runs out of time does not stop the later ones. Stages that need
# something which is not there (a GPU, pytest, compute-sanitizer) are skipped, with the reason. The exit status is 1 if the
# build, a test or a benchmark's check failed. Needs Python with torch; installs nothing outside a temporary folder.
set -u
cd "$(dirname "$0")/.." || exit 1
if [ "${1:-}" = "-h" ] || [ "${1:-}" = "--help" ]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit 0
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export XDG_CACHE_HOME="$scratch/cache" TRITON_CACHE_DIR="$scratch/triton" PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # the tests ask for deterministic algorithms

has() { python3 -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

device=$(python3 -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")' 2>/dev/null)
no_gpu=""
[ -n "$device" ] || no_gpu="torch sees no CUDA device"
name=$(echo "${device:-no device}" | tr '[:upper:]' '[:lower:]' | tr -cs '[:alnum:]\n' '-')
out=${OUT:-benchmarks/results/$name}
mkdir -p "$out" || exit 1
log="$out/gpu_check.log"
: >"$log"
table="$scratch/table"
: >"$table"
failed=0

line() { printf '%-24s %-10s %5s  %s\n' "$1" "$2" "$3" "$4" | tee -a "$table"; }

# stage NAME END REASON COMMAND...: run until END seconds after the start at most, or skip it for the reason, if there is one.
# An interrupt comes before the kill, so that pytest still writes what it has measured.
stage() {
    local name=$1 end=$2 reason=$3 started=$SECONDS limit status
    shift 3
    limit=$((end - SECONDS))
    [ -n "$reason" ] || [ "$limit" -ge 5 ] || reason="no time left"
    if [ -n "$reason" ]; then
        line "$name" skipped - "$reason"
        return 0
    fi
    printf '\n==== %s: %s\n' "$name" "$*" >>"$log"
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$scratch/output" 2>&1
    status=$?
    cat "$scratch/output" >>"$log"
    local last
    last=$(grep -v '^ *$' "$scratch/output" | tail -n 1 | cut -c1-110)
    if [ $status -eq 0 ]; then
        line "$name" ok "$((SECONDS - started))s" "$last"
    else
        [ $status -eq 124 ] || [ $status -eq 137 ] && last="stopped after ${limit} s; $last"
        line "$name" FAILED "$((SECONDS - started))s" "$last"
        failed=1
        grep -E '^(FAILED|ERROR|E  )|Error:|error:' "$scratch/output" | cut -c1-160 | head -n 12
    fi
    return $status
}

no_pytest=$no_gpu
[ -n "$no_pytest" ] || has pytest || no_pytest="pytest is missing"

# ---- build: as a user installs it, but into a temporary folder; else from the checkout at first use ------------------

checkout="$PWD:$PWD/python"
build_from_checkout() {
    PYTHONPATH="$checkout" MADTP_KERNELS_BUILD=1 python3 -c '
from madtp_kernels import native
print(native.load().build_info())'
}
install_from_source() {
    MADTP_KERNELS_BUILD=1 python3 -m pip install -q --no-index --no-deps --no-build-isolation --target "$scratch/site" . &&
        PYTHONPATH="$scratch/site" python3 -c '
from madtp_kernels import native
print(native.load().build_info())'
}
export -f build_from_checkout install_from_source
export checkout scratch
site=$checkout
if stage "pip install" 130 "$no_gpu" bash -c install_from_source; then
    [ -n "$no_gpu" ] || site="$scratch/site"
else
    stage "build at first use" 190 "$no_gpu" bash -c build_from_checkout
fi
export PYTHONPATH="$site"

stage "environment" 195 "" bash -c '
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv
python3 -m madtp_kernels.info'

# ---- tests ----------------------------------------------------------------------------------------------------------

pytest="python3 -m pytest -q -p no:cacheprovider --tb=short"
operations="tests/test_linear.py tests/test_operators.py tests/test_contracts.py tests/test_ragged.py tests/test_batch_invariance.py"
! has hypothesis || operations="$operations tests/test_properties.py"
stage "gpu tests" 230 "$no_pytest" $pytest tests/test_gpu.py
stage "conformance" 265 "$no_pytest" $pytest tests/test_conformance.py
stage "operations" 305 "$no_pytest" $pytest $operations
stage "models" 335 "$no_pytest" $pytest tests/test_model.py tests/test_tasks.py tests/test_clip.py tests/test_patch.py

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
no_sanitizer=$no_pytest
[ -n "$no_sanitizer" ] || [ -n "$sanitizer" ] || no_sanitizer="compute-sanitizer is missing"
# Without PyTorch's caching allocator every tensor is an allocation of its own, so that a step out of it is seen.
stage "compute-sanitizer" 370 "$no_sanitizer" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    "$sanitizer" --tool memcheck --error-exitcode 9 $pytest tests/test_gpu.py -k small_uneven

# ---- benchmarks -----------------------------------------------------------------------------------------------------

only=""
has pytest_benchmark && only="--benchmark-only --benchmark-columns=median,rounds"
measure() { stage "$1" "$2" "$no_pytest" $pytest $only "benchmarks/test_$3.py" --records "$out/$3.json"; }
measure "benchmarks: operations" 425 operations
measure "benchmarks: blocks" 455 blocks
measure "benchmarks: model" 505 model
measure "benchmarks: captions" 530 captions

# ---- the short table last -------------------------------------------------------------------------------------------

records=$(ls "$out"/*.json 2>/dev/null)
{
    if [ -n "$records" ]; then
        echo
        python3 benchmarks/report.py $records --only model
        echo
        python3 benchmarks/report.py $records --only captions
        echo
        python3 benchmarks/report.py $records --only goals
    fi
    echo
    echo "${device:-no GPU}: $SECONDS s, log in $log"
    cat "$table"
} | tee -a "$log"
exit $failed
