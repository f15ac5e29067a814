#!/usr/bin/env bash
# Set up everything and run the tests:   bash tests/run.sh [quick] [pytest arguments]
#   bash tests/run.sh                     ruff, mypy and all tests
#   bash tests/run.sh quick               ruff, mypy and the quick tests (under two minutes on two cores)
#   bash tests/run.sh tests/stream -x     some tests
# WORKERS=N sets the number of test processes (one a core without it).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

selection=()
if [ "${1:-}" = quick ]; then selection=(-m "not slow"); shift; fi

missing=()
while read -r package _; do  # system packages that tests need
    case $package in ''|'#'*) continue ;; esac
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done < tests/apt-packages.txt
if [ ${#missing[@]} -gt 0 ]; then
    install="apt-get install -y --no-install-recommends ${missing[*]}"
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "Installing the system packages of tests/apt-packages.txt"
        run $install || { run apt-get update && run $install; } || stop "" "  remedy: see why \`$install\` fails"
    else
        say "Without ${missing[*]} some tests are skipped. To run them, as root: $install"
    fi
fi

prepare_python dev
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
failed=0
if [ $# -eq 0 ]; then
    say "Style and types"
    run "$PYTHON" -m ruff check . || failed=1
    run "$PYTHON" -m ruff format --check --quiet . || failed=1
    run "$PYTHON" -m mypy || failed=1
fi
say "Tests"
workers=${WORKERS:-$("$PYTHON" -c 'import os; print(len(os.sched_getaffinity(0)))')}
# loadfile keeps a file's tests together: they share what their fixtures trained
run "$PYTHON" -m pytest -n "$workers" --dist loadfile --durations=15 "${selection[@]}" "$@" || failed=1
exit $failed
