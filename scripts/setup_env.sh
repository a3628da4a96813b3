#!/usr/bin/env bash
# Makes .venv and installs this checkout into it, in place.
#
# Usage: scripts/setup_env.sh [EXTRA]    EXTRA: test, bench, plots, s3, redis, ann, onnx, wandb, mlflow, triton or docs
# Repeating it costs nothing while what is installed has not changed. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME

extra=${1:-}
python=${PYTHON:-python3}
constraints=scripts/constraints.txt
stamp=.venv/installed-${extra:-base}

say() { printf '==> %s\n' "$*"; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    say "Python 3.10 or later is needed, but $python is $("$python" -V 2>&1); set PYTHON=/path/to/python3"
    exit 1
}

# A package of the system is installed by whoever owns the machine, not by a test run.
if [[ $extra == test ]] && ! command -v chromium chromium-browser google-chrome >/dev/null; then
    say "no Chromium: the browser tests will be skipped, unless you install it (Debian: apt-get install chromium)"
fi

wanted=$({
    pwd
    command -v "${CXX:-g++}" || true
    cat pyproject.toml setup.py "$constraints" embedtrain/ops/*/*.{cpp,h} embedtrain/ops/_backend/header.py
} | cksum)
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    exit 0
fi

if [[ ! -x .venv/bin/python ]]; then
    say "making .venv with $("$python" -V)"
    # Some distributions ship venv without the pip that it would copy; then pip installs itself from outside.
    "$python" -m venv .venv >/dev/null 2>&1 || {
        "$python" -m venv --clear --without-pip .venv
        "$python" -m pip --python .venv/bin/python install -qq pip
    }
fi

say "installing embedtrain${extra:+[$extra]} with $(grep ^torch "$constraints"); the first time takes minutes"
.venv/bin/python -m pip install -qq --disable-pip-version-check -c "$constraints" -e ".${extra:+[$extra]}"
if [[ ! -f embedtrain/ops/_backend/libembedtrain_native.so ]]; then
    say "WARNING: no native library was built, embedtrain will be slow: install a C++ compiler (g++) and repeat"
fi
echo "$wanted" >"$stamp"
