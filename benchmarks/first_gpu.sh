#!/usr/bin/env bash
# The first ten minutes on a GPU: whether everything is right there, and how fast it is.
#
#   benchmarks/first_gpu.sh [--rehearse] [FOLDER]
#   benchmarks/first_gpu.sh --carry [PYTHON_VERSION]
#
# FOLDER, which is $OUT or first_gpu unless given, gets results.txt, written as the parts go on, and summary.txt. A part
# that fails or takes too long ends, and the next one begins. The exit status is the number of parts that failed.
#
# PYTHON (python3 unless set) must have PyTorch for CUDA with its Triton, and NumPy; the package itself need not be
# installed. Triton compiles with a C compiler and Python's headers, and part 0 says if they are missing. Nothing is
# downloaded there. What else the package and its tests import lies in benchmarks/wheels, if --carry was run before on a
# machine with network: it fetches wheels for Linux on x86-64 and a version of Python (3.12 unless given; 60 MB, most of
# it pyarrow). Those that PYTHON lacks are unpacked for the time of the run. The comparison with FBGEMM needs fbgemm-gpu,
# and the part that watches the kernels needs compute-sanitizer: a part that lacks what it needs says so. The native
# library for the CPU's side is a file in the tree; without it that side is slower.
#
# --rehearse runs every part on the CPU at a tiny size: it shows that the script works, and its figures mean nothing.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${PYTHON-python3}
if [[ ${1-} == --carry ]]; then
    mapfile -t names < <("$python" benchmarks/carried.py --names)
    "$python" -m pip download --no-deps --only-binary=:all: --platform manylinux_2_28_x86_64 \
        --platform manylinux2014_x86_64 --python-version "${2-3.12}" --constraint scripts/constraints.txt \
        --dest benchmarks/wheels "${names[@]}"
    exit
fi
# Exported, as the parts are: `timeout` starts each in a shell of its own.
export REHEARSAL=""
if [[ ${1-} == --rehearse ]]; then
    REHEARSAL=--rehearse
    shift
fi
folder=${1-${OUT-first_gpu}}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT
# The home folder need not be there or be writable; the parts share what Triton compiles.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR-$unpacked/triton}

if [[ ! $REHEARSAL ]] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "benchmarks/first_gpu.sh needs a CUDA GPU, and PyTorch finds none; --rehearse runs its parts on the CPU" >&2
    exit 1
fi
mkdir -p "$folder" || exit 1
results=$folder/results.txt summary=$folder/summary.txt
: > "$results" > "$summary"
failed=0

"$python" benchmarks/carried.py "$unpacked/packages" 2>&1 | tee -a "$results"
export PYTHONPATH=$PYTHONPATH:$unpacked/packages

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
import os, shutil, sys, sysconfig
from pathlib import Path
import torch, triton
import embedtrain
import embedtrain.checkpoint, embedtrain.data.prepare
from embedtrain.ops._backend import library
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, Triton {triton.__version__}")
headers = Path(sysconfig.get_path("include"), "Python.h")
compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
if compiler is None or not headers.is_file():
    print(f"Triton cannot compile: C compiler {compiler or 'missing'}, {headers} {'there' if headers.is_file() else 'missing'}")
print("native library:", library.find() or f"not built, the CPU's side of comparisons is slower: {library.how_to_build()}")
END
}

gpu_tests() {
    if ! "$python" -c 'import pytest, pytest_timeout, xdist, hypothesis, psutil' 2> /dev/null; then
        echo "pytest, pytest-timeout, pytest-xdist, hypothesis or psutil is not installed"
        return 3
    fi
    "$python" -m pytest tests/gpu -q -n "${TEST_WORKERS-4}" -p no:cacheprovider
}

sanitizer() {
    local tool
    tool=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2> /dev/null | head -n 1)
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

part "0 machine" 40 machine
part "1 a step of each model beside the CPU" 75 run steps
part "2 tests" 105 gpu_tests
part "3 kernels under compute-sanitizer" 85 sanitizer
part "4 steps of each model" 80 run loop
part "5 kernels beside the copy and the prediction" 90 kernels
part "6 tables beside FBGEMM" 45 run tables
part "7 resume, saves, rows on the host" 40 run resume
part "8 word vectors" 40 run words
echo
cat "$summary"
exit "$failed"
