#!/usr/bin/env bash
# From a fresh clone to two videos: makes an environment, installs, and runs both paths of the engine: the small video
# model on a drawn face, then a photograph. Face, photograph and voice come with the packages. Arguments go to
# `streamdiff generate`.
#
#   bash launch/quickstart.sh                    the small model for 4 s, then a photograph says a sentence
#   bash launch/quickstart.sh --seconds 10       anything that `streamdiff generate --help` lists
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install demo -e ".[avatar,demo,serve,listen]"
mkdir -p out
"$venv/bin/streamdiff" generate --out out/quickstart.mp4 "$@"
"$venv/bin/streamdiff" talk --out out/talk.mp4
