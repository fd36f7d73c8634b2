#!/usr/bin/env bash
# From a fresh clone to two videos: makes an environment, installs, and runs both paths of the engine on a photograph and
# a voice that come with the packages of the demo. Arguments go to `streamdiff generate`.
#
#   bash launch/quickstart.sh                    the tiny preset for 4 s, then the photograph says a sentence
#   bash launch/quickstart.sh --seconds 10       anything that `streamdiff generate --help` lists
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install demo -e ".[avatar,demo]"
mkdir -p out
"$venv/bin/streamdiff" generate --out out/quickstart.mp4 "$@"
"$venv/bin/streamdiff" talk --out out/talk.mp4
