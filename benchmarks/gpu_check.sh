#!/usr/bin/env bash
# Builds, measures and tests on a machine with one GPU and no network, what is worth most first.
#
#   benchmarks/gpu_check.sh first           build tile-tests operations model encoders ranked variants memcheck racecheck
#                                           gpu-tests same-sample pairs counters: about 8 minutes on an H200
#   benchmarks/gpu_check.sh second          build-tiles tune operations model gpu-tests memcheck racecheck conformance
#                                           operation-tests: about 7 minutes
#   benchmarks/gpu_check.sh last            build-short model operations-short same-bfloat16 gpu-tests memcheck racecheck
#                                           conformance: within LIMIT=285
#   benchmarks/gpu_check.sh tests           operation-tests model-tests: about 2 minutes
#   benchmarks/gpu_check.sh benchmarks      the whole of benchmarks/, for report.py: some minutes
#   benchmarks/gpu_check.sh model counters  the stages that are named; without names everything
#   benchmarks/gpu_check.sh --dry-run ...   tiny sizes on whatever device there is, to see that everything runs; tests are
#                                           collected only
#
# OUT    folder that receives the log, the figures (one line of JSON each, written as soon as it is known), the records
#        and the counters; benchmarks/results/<device> by default
# LIMIT  seconds for everything (none by default); each stage has a limit of its own besides
# CACHE  folder of compiled kernels, kept from one run to the next
#
# A stage that fails or runs out of time does not stop the later ones, and what it has written stays. They are ordered so that a
# machine which goes away early takes the least with it: are the kernels right, how fast are they, how fast are whole models. What
# each took on an H200 stands beside it below. Stages that need what
# is not there (a GPU, pytest, ncu) are skipped, with the reason. The exit status is 1 if a stage failed. Needs Python with
# torch and, for the kernels in CUDA C++, nvcc on PATH, in CUDA_HOME or in /usr/local/cuda.
set -u
cd "$(dirname "$0")/.." || exit 1

ENCODERS="encoders-siglip2-b16-512 encoders-clip-l14 encoders-clip-b32"
FIRST="build tile-tests operations model ${ENCODERS% *} ranked variants memcheck racecheck gpu-tests same-sample pairs ${ENCODERS##* } counters"
SECOND="build-tiles tune operations model gpu-tests memcheck racecheck conformance operation-tests"
LAST="build-short model operations-short same-bfloat16 gpu-tests memcheck racecheck conformance"
TESTS="operation-tests model-tests"
BENCHMARKS="bench-operations bench-blocks bench-model bench-captions"
dry="" stages=""
for word in "$@"; do
    case "$word" in
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit 0 ;;
        --dry-run) dry=--dry-run ;;
        first) stages="$stages $FIRST" ;;
        second) stages="$stages $SECOND" ;;
        last) stages="$stages $LAST" ;;
        tests) stages="$stages $TESTS" ;;
        encoders) stages="$stages $ENCODERS" ;;
        benchmarks) stages="$stages $BENCHMARKS" ;;
        *)
            case " $FIRST $SECOND $LAST $TESTS $BENCHMARKS " in
                *" $word "*) stages="$stages $word" ;;
                *) echo "$0: no stage $word; see --help" >&2 && exit 2 ;;
            esac
            ;;
    esac
done
[ -n "$stages" ] || stages="${FIRST/build/build-tiles} memcheck racecheck conformance tune $TESTS $BENCHMARKS"

if [ -z "${CUDA_HOME:-}" ] && ! command -v nvcc >/dev/null && [ -x /usr/local/cuda/bin/nvcc ]; then
    export CUDA_HOME=/usr/local/cuda
fi
cache=${CACHE:-${TMPDIR:-/tmp}/madtp_gpu_check}
export TRITON_CACHE_DIR="$cache/triton" PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$PWD/python"
[ -n "$dry" ] || export XDG_CACHE_HOME="$cache"

has() { python3 -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }
# tool NAME: its path; the toolkit's folder need not be on PATH.
tool() { command -v "$1" || ls {"${CUDA_HOME:-/usr/local/cuda}",/usr/local/cuda}/bin/"$1" 2>/dev/null | head -n 1; }

device=$(python3 -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")' 2>/dev/null)
no_gpu=""
[ -n "$device" ] || no_gpu="torch sees no CUDA device"
no_pytest=$no_gpu
[ -n "$no_pytest" ] || has pytest || no_pytest="pytest is missing"
no_device=$no_gpu no_tests=$no_pytest
[ -z "$dry" ] || no_device=""
[ -z "$dry" ] || ! has pytest || no_tests="" no_pytest=""
name=$(echo "${device:-no device}" | tr '[:upper:]' '[:lower:]' | tr -cs '[:alnum:]\n' '-')
out=${OUT:-benchmarks/results/$name}
mkdir -p "$out" "$cache" || exit 1
log="$out/gpu_check.log" figures="$out/figures.jsonl" table="$cache/table"
: >"$table"
failed=0

line() { printf '%-18s %-8s %5s  %s\n' "$1" "$2" "$3" "$4" | tee -a "$table"; }

# stage NAME SECONDS REASON COMMAND...: run for that long at most, or skip it for the reason, if there is one. An interrupt
# comes before the kill, so that pytest still says what failed.
stage() {
    local name=$1 limit=$2 reason=$3 started=$SECONDS status word=ok last
    [ -z "$dry" ] || limit=$((limit * 10)) # the machine at hand may be slow, or busy
    shift 3
    if [ -n "${LIMIT:-}" ] && [ $((LIMIT - SECONDS)) -lt "$limit" ]; then
        limit=$((LIMIT - SECONDS))
    fi
    [ -n "$reason" ] || [ "$limit" -ge 8 ] || reason="no time left"
    if [ -n "$reason" ]; then
        line "$name" skipped - "$reason"
        return 0
    fi
    local output="$out/$name.txt"
    printf '\n==== %s: %s\n' "$name" "$*" >>"$log"
    timeout --signal=INT --kill-after=5 "$limit" "$@" 2>&1 | tee "$output" >>"$log"
    status=${PIPESTATUS[0]}
    last=$(grep -v '^ *$' "$output" | tail -n 1 | cut -c1-110)
    if [ "$status" -ne 0 ]; then
        word=FAILED failed=1
        [ "$status" -ne 124 ] && [ "$status" -ne 137 ] || last="stopped after $limit s; $last"
        grep -E '^(FAILED|ERROR|E  )|Error:|error:|"error"' "$output" | cut -c1-200 | head -n 12
    fi
    line "$name" "$word" "$((SECONDS - started))s" "$last"
    printf '{"stage": "%s", "figure": "stage", "status": %d, "seconds": %d, "at": %d}\n' \
        "$name" "$status" "$((SECONDS - started))" "$SECONDS" >>"$figures"
    # Of tests and sanitizers the whole output is worth a file; the others' is in the log.
    case "$name" in *tests | *check | conformance) ;; *) rm -f "$output" ;; esac
}

# The tiles that prove the fastest serve the stages after this one, and stay in the source for whoever commits them.
tune() {
    stage tune 60 "$no_gpu" python3 benchmarks/tune.py --out "$figures" --write
    cp madtp_kernels/linear/tiles.py "$out/tiles.py"
    stage tune-float32 20 "$no_gpu" python3 benchmarks/tune.py --out "$figures" --dtype float32
}

measure() { stage "$1" "$2" "$no_device" python3 benchmarks/gpu_figures.py "$1" --out "$figures" $dry; }

parallel=""
! has xdist || parallel="-n 8"
pytest="env CUBLAS_WORKSPACE_CONFIG=:4096:8 python3 -m pytest -q -p no:cacheprovider --tb=short $parallel"
run_tests() { stage "$1" "$2" "$no_tests" $pytest ${dry:+--collect-only} -rfE "${@:3}"; }

only=""
! has pytest_benchmark || only="--benchmark-only --benchmark-columns=median,rounds -p no:xdist"
records() {
    stage "bench-$1" "$2" "$no_pytest" python3 -m pytest -q -p no:cacheprovider --tb=short $only ${dry:+--small} "benchmarks/test_$1.py" \
        --records "$out/$1.json"
}

# Without PyTorch's caching allocator every tensor is an allocation of its own, so that a step out of it is seen.
sanitize() {
    local sanitizer missing=$no_gpu
    sanitizer=$(tool compute-sanitizer)
    [ -n "$missing" ] || [ -n "$sanitizer" ] || missing="compute-sanitizer is missing"
    stage "$1" "$2" "$missing" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        "$sanitizer" --tool "$1" --error-exitcode 9 python3 benchmarks/gpu_figures.py small --out "$figures"
}

counters() {
    local ncu missing=$no_gpu section sections=""
    ncu=$(tool ncu)
    [ -n "$missing" ] || [ -n "$ncu" ] || missing="ncu is missing"
    for section in SpeedOfLight LaunchStats Occupancy MemoryWorkloadAnalysis ComputeWorkloadAnalysis WarpStateStats; do
        sections="$sections --section $section"
    done
    stage counters 60 "$missing" "$ncu" --clock-control none --profile-from-start off $sections --csv --page details \
        --print-details all --log-file "$out/counters.csv" python3 benchmarks/gpu_figures.py launches --out "$figures"
}

encoder() {
    local missing=$no_device size="--batch 64 --rounds 20"
    [ -n "$missing" ] || has transformers || missing="transformers is missing"
    [ -z "$dry" ] || size="--batch 1 --rounds 1"
    [ -z "$dry" ] || [ "$1" = clip-b32 ] || missing="the smallest is enough"
    stage "encoders-$1" 35 "$missing" python3 benchmarks/encoders.py --model "$1" --dtype bfloat16 $size --out "$figures"
}

for chosen in $stages; do
    case "$chosen" in
        build | build-tiles) measure "$chosen" 130 ;;         # 72 s
        build-short) measure build-short 80 ;;
        tune) tune ;;
        operations) measure operations 60 ;;                  # 24 s
        operations-short) measure operations-short 40 ;;
        model) measure model 70 ;;                            # 34 s
        ranked) measure ranked 40 ;;                          # 25 s
        variants) measure variants 60 ;;                      # 25 s expected
        pairs) measure pairs 15 ;;                            # 7 s
        tile-tests)                                           # the chosen tiles together; 40 s expected, a third of gpu-tests
            run_tests tile-tests 70 tests/test_gpu.py tests/kernels/test_triton_interpreter.py \
                -k "agrees or same_bits or ranked_novelty or few_launches or bad_values or log_sum or too_large"
            ;;
        gpu-tests) run_tests gpu-tests 120 --durations=10 tests/test_gpu.py ;; # 80 s
        same-sample | same-bfloat16) measure "$chosen" 40 ;;  # 16 s
        counters) counters ;;                                 # 23 s on an H100
        encoders-*) encoder "${chosen#encoders-}" ;;          # 20 s each
        memcheck) sanitize "$chosen" 60 ;;                    # 16 s on an H100, with fewer operations
        racecheck) sanitize "$chosen" 100 ;;                  # 48 s there
        conformance) run_tests conformance 60 tests/test_conformance.py ;;
        operation-tests)
            run_tests operation-tests 80 tests/kernels/test_{linear,linear_pair,merging,similarity,received,ragged_rows}.py \
                tests/kernels/test_{grouped_queries,operators,contracts,ragged}.py tests/test_batch_invariance.py
            ;;
        model-tests) run_tests model-tests 60 tests/models/test_{model,tasks,clip}.py tests/patch/test_patch.py ;;
        bench-*) records "${chosen#bench-}" 120 ;;
    esac
done

{
    echo
    [ ! -f "$figures" ] || python3 benchmarks/gpu_figures.py --table "$figures"
    echo
    echo "${device:-no GPU}: $SECONDS s, log in $log"
    cat "$table"
} 2>&1 | tee -a "$log"
exit $failed
