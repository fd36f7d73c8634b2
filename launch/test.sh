#!/usr/bin/env bash
# Makes an environment, installs what the checks need, and runs them: lint, format, import contracts, types, tests.
#
#   bash launch/test.sh          the default suite, minutes
#   bash launch/test.sh --all    the slow tests as well
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
case "${1:-}" in
    "" | --all) ;;
    -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) fail "unknown argument $1; give --all or nothing" ;;
esac
install dev -e ".[avatar,avatar-eval,demo,encoders]" --group dev
# One thread per process: the tests start many, and two threads on two busy cores are slower than one.
export OMP_NUM_THREADS=1 PATH="$venv/bin:$PATH"
poe check
if [ "${1:-}" = --all ]; then
    pytest -m "slow and not gpu and not multigpu" --durations=15
fi
