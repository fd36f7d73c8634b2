#!/usr/bin/env bash
# Runs one command on several ranks of this machine, as torchrun does, but where nobody else can reach anything: torchrun's
# rendezvous is a file that only this user can read instead of a store that listens on every interface.
#
#   bash launch/ranks.sh 5 generate --out out/video.mp4
#
# Uses .venv beside the project, or the environment that is active.
set -euo pipefail
case "${1:-}" in
    [1-9] | [1-9][0-9]) ;;
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "error: say how many ranks, 1 to 99, then the command; see --help" >&2; exit 2 ;;
esac
count=$1
shift
python=${VIRTUAL_ENV:-"$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv"}/bin/python
[ -x "$python" ] || { echo "error: there is no environment at $python; run launch/quickstart.sh, or activate one" >&2; exit 2; }
meeting=$(mktemp)
# Without the first line torchrun opens a second store for its ranks; they meet at one of their own.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "$python" -m torch.distributed.run --nnodes 1 --nproc-per-node "$count" --local-addr 127.0.0.1 \
    --rdzv-backend c10d --rdzv-conf store_type=file --rdzv-endpoint "$meeting" --rdzv-id "${meeting##*/}" \
    -m streamdiff "$@"
