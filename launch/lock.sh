#!/usr/bin/env bash
# Writes launch/tested.txt anew: every package that the tested environment has (but torch, whose build depends on the
# machine), with its version and the SHA-256 of its wheel. Asks pip alone, and installs nothing. Then writes
# launch/sbom.json from it, a bill of materials (CycloneDX), with a tool in an environment of its own.
#
#   bash launch/lock.sh                   for the Python and the machine that it runs on
#   bash launch/lock.sh --sbom            the bill of materials alone
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
case "${1:-}" in
    "" | --sbom) ;;
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) fail "unknown argument $1; see --help" ;;
esac
make_venv
# write_sbom: torch stands in it without a hash, for its build depends on the machine.
write_sbom() {
    local tools
    tools=$(mktemp -d)
    "$venv/bin/python" -m venv "$tools" && "$tools/bin/python" -m pip install --quiet --only-binary :all: "cyclonedx-bom==$tested_cyclonedx" \
        || fail "cannot install cyclonedx-bom $tested_cyclonedx"
    { grep -v '^#' launch/tested.txt; echo "torch==$tested_torch"; } \
        | "$tools/bin/cyclonedx-py" requirements --output-reproducible --spec-version 1.6 --mc-type library \
            --pyproject pyproject.toml --output-file launch/sbom.json -
    rm -rf "$tools"
    say "Wrote launch/sbom.json"
}
if [ "${1:-}" = --sbom ]; then
    write_sbom
    exit 0
fi
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
write_sbom
