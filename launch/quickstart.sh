#!/usr/bin/env bash
# From a fresh clone to a video: makes an environment, installs, and runs the main job on a photograph and a voice that
# come with the packages of the demo. Arguments go to `streamdiff generate`.
#
#   bash launch/quickstart.sh                    4 s of video on the tiny preset
#   bash launch/quickstart.sh --seconds 10       anything that `streamdiff generate --help` lists
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install demo -e ".[avatar,demo]"
mkdir -p out
"$venv/bin/streamdiff" generate --out out/quickstart.mp4 "$@"
