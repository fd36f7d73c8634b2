#!/usr/bin/env bash
# Writes launch/tested.txt anew: every package that the tested environment has (but torch, whose build depends on the
# machine), with its version and the SHA-256 of its wheel. Asks pip alone, and installs nothing.
#
#   bash launch/lock.sh                   for the Python and the machine that it runs on
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
case "${1:-}" in
    "") ;;
    -h | --help) sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) fail "unknown argument $1; see --help" ;;
esac
make_venv
report=$(mktemp)
trap 'rm -f "$report"' EXIT
"$venv/bin/python" -m pip install --quiet --dry-run --ignore-installed --only-binary :all: --report "$report" \
    "torch==$tested_torch" hatchling editables -e ".[$locked_extras]"
"$venv/bin/python" - "$report" >launch/tested.txt <<'PYTHON'
import json
import platform
import sys

found = {}
for item in json.load(open(sys.argv[1], encoding="utf-8"))["install"]:
    name = item["metadata"]["name"].lower().replace("_", "-")
    if name not in ("streamdiff", "torch"):
        found[name] = (item["metadata"]["version"], item["download_info"]["archive_info"]["hashes"]["sha256"])
machine = f"Python {'.'.join(platform.python_version_tuple()[:2])}, {platform.system()} {platform.machine()}"
print(f"# Made by launch/lock.sh for {machine}. STREAMDIFF_LOCKED=1 makes the scripts of launch/ install from it.")
for name, (version, digest) in sorted(found.items()):
    print(f"{name}=={version} --hash=sha256:{digest}")
PYTHON
say "Wrote launch/tested.txt: $(grep -c == launch/tested.txt) packages"
