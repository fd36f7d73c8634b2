#!/usr/bin/env bash
# Makes an environment, installs what the checks need, and runs them: lint, format, import contracts, types, tests.
#
#   bash launch/test.sh                   the default suite, minutes
#   bash launch/test.sh --slow PATH...    the slow tests under these paths as well
#   bash launch/test.sh --all             all slow tests as well
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
case "${1:-}" in
    "" | --all) ;;
    --slow) [ $# -gt 1 ] || fail "--slow needs paths, such as tests/kernels" ;;
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) fail "unknown argument $1; give --all, --slow PATH... or nothing" ;;
esac
install dev -e ".[avatar,avatar-eval,demo,encoders,listen,think,serve,livekit,pipecat]" --group dev
# One thread per process: the tests start many, and two threads on two busy cores are slower than one.
export OMP_NUM_THREADS=1 PATH="$venv/bin:$PATH"
poe check
if [ $# -gt 0 ]; then
    shift # the option; what is left are paths, or nothing: all
    pytest -n 2 --dist loadfile -m "slow and not long and not gpu and not multigpu" --no-other-skips --durations=15 "$@"
fi
