#!/usr/bin/env bash
# Makes .venv with the test extra and runs every check.
#
# Usage: scripts/test.sh [--no-lint] [--all] [PYTEST ARGUMENTS]
#   --no-lint   runs the tests alone, not the linter and the type checker
#   --all       runs the slow tests too, and starts every process cold
#
# The tests run in a worker per core, four at most. A file runs in one worker, so that its fixtures are made once; the
# long files come first. The tests marked serial follow in a run of their own, so that nothing runs beside them.
# All checks run; the exit status is that of the first one that failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME

lints=true
if [[ ${1-} == --no-lint ]]; then
    lints=false
    shift
fi

scripts/setup_env.sh test || exit

status=0
note() {
    (($1 == 0)) && return
    ((status != 0)) || status=$1
    echo "==> $2 FAILED (exit status $1)"
}

# The linter and the type checker use one core for a minute, so they run beside the tests. Their output comes last.
lint() {
    local failed=0
    for check in "ruff check --quiet" "ruff format --check --quiet" mypy; do
        echo "==> $check"
        # shellcheck disable=SC2086
        .venv/bin/python -m $check || failed=1
    done
    return $failed
}
lint_output=$(mktemp)
trap 'rm -f "$lint_output"' EXIT
lint_pid=
if $lints; then
    lint >"$lint_output" 2>&1 &
    lint_pid=$!
fi

# Each worker does its arithmetic on one core.
export OMP_NUM_THREADS=1
nothing_collected=5
workers=(--numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder)
echo "==> pytest $*"
.venv/bin/python -m pytest --part parallel "${workers[@]}" "$@"
parallel=$?
echo "==> pytest $*: the tests that run alone"
.venv/bin/python -m pytest --part serial "$@"
serial=$?
if ((parallel == nothing_collected)); then parallel=$serial; fi
if ((serial == nothing_collected)); then serial=0; fi
if [[ -n $lint_pid ]]; then
    wait "$lint_pid"
    lint_status=$?
    cat "$lint_output"
    note $lint_status "lint"
fi
note $parallel "pytest"
note $serial "pytest, the tests that run alone"
exit $status
