#!/usr/bin/env bash
# The first ten minutes on a GPU: whether everything is right there, and how fast it is.
#
#   benchmarks/first_gpu.sh [--rehearse] [FOLDER]
#
# FOLDER, which is $OUT or first_gpu unless given, gets results.txt, written as the parts go on, and summary.txt. A part
# that fails or takes too long ends, and the next one begins. The exit status is the number of parts that failed.
#
# PYTHON (python3 unless set) must have the package's dependencies; nothing is downloaded. Tests and the comparison with
# FBGEMM need pytest, pytest-xdist and fbgemm-gpu, and the part that watches the kernels needs compute-sanitizer: a part
# that lacks what it needs says so.
#
# --rehearse runs every part on the CPU at a tiny size: it shows that the script works, and its figures mean nothing.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Exported, as the parts are: `timeout` starts each in a shell of its own.
export REHEARSAL=""
if [[ ${1-} == --rehearse ]]; then
    REHEARSAL=--rehearse
    shift
fi
folder=${1-${OUT-first_gpu}}
python=${PYTHON-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

if [[ ! $REHEARSAL ]] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "benchmarks/first_gpu.sh needs a CUDA GPU, and PyTorch finds none; --rehearse runs its parts on the CPU" >&2
    exit 1
fi
mkdir -p "$folder" || exit 1
results=$folder/results.txt summary=$folder/summary.txt
: > "$results" > "$summary"
failed=0

# part NAME SECONDS COMMAND...: runs a part, and keeps what it printed.
part() {
    local name=$1 seconds=$2 began=$SECONDS status
    shift 2
    echo "==> $name" | tee -a "$results"
    timeout --kill-after=5 "$seconds" bash -c "$*" 2>&1 | tee -a "$results"
    status=${PIPESTATUS[0]}
    case $status in
        0) status="done" ;;
        3) status="left out: it lacks what it needs" ;;
        124 | 137) status="stopped after its $seconds seconds" failed=$((failed + 1)) ;;
        *) status="FAILED with exit status $status" failed=$((failed + 1)) ;;
    esac
    echo "$name: $status, $((SECONDS - began)) s" | tee -a "$results" "$summary"
}

run() { "$python" benchmarks/first_gpu.py "$@" $REHEARSAL; }
export -f run
export python

machine() {
    uname -srm
    nproc
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || true
    "$python" - << 'END'
import sys
import torch, triton
import embedtrain
from embedtrain.ops._backend import library
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, Triton {triton.__version__}")
print("native library:", library.find() or f"not built, the CPU's side of comparisons is slower: {library.how_to_build()}")
END
}

gpu_tests() {
    if ! "$python" -c 'import pytest, xdist' 2> /dev/null; then
        echo "pytest and pytest-xdist are not installed"
        return 3
    fi
    "$python" -m pytest tests/gpu -q -n "${TEST_WORKERS-4}" -p no:cacheprovider
}

sanitizer() {
    local tool
    tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2> /dev/null)
    if [[ -z $tool ]]; then
        echo "compute-sanitizer is not on this machine; the same cases run without it:"
        run sanitized || return
        return 3
    fi
    "$tool" --tool memcheck --error-exitcode 9 "$python" benchmarks/first_gpu.py sanitized $REHEARSAL
}

kernels() {
    if [[ $REHEARSAL ]]; then
        "$python" benchmarks/gpu.py --kernels --rehearse --num-rows 300 --num-ids 100
    else
        "$python" benchmarks/gpu.py --kernels
    fi
}
export -f machine gpu_tests sanitizer kernels

part "0 machine" 20 machine
part "1 a step of each model beside the CPU" 80 run steps
part "2 tests" 110 gpu_tests
part "3 kernels under compute-sanitizer" 90 sanitizer
part "4 steps of each model" 80 run loop
part "5 kernels beside the copy and the prediction" 90 kernels
part "6 tables beside FBGEMM" 45 run tables
part "7 resume, saves, rows on the host" 45 run resume
part "8 word vectors" 40 run words
echo
cat "$summary"
exit "$failed"
