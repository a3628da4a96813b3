#!/usr/bin/env bash
# Makes .venv with the test extra and runs every check. Arguments go to pytest.
# All checks run; the exit status is that of the first one that failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME

scripts/setup_env.sh test || exit

status=0
check() {
    local code
    echo "==> $1"
    .venv/bin/python -m "$@" && return
    code=$?
    ((status != 0)) || status=$code
    echo "==> $1 FAILED (exit status $code)"
}

check ruff check --quiet
check ruff format --check --quiet
check mypy
echo "==> pytest"
.venv/bin/python -m pytest "$@"
code=$?
exit $((status != 0 ? status : code))
