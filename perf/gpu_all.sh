#!/usr/bin/env bash
# Everything that needs a GPU, in parts of less than nine minutes each, from a plain checkout: Python 3.11 or newer with
# CUDA builds of torch and triton, numpy and safetensors; nothing is installed and nothing is fetched.
#
#   bash perf/gpu_all.sh                       every part, one after the other (about 15 minutes)
#   bash perf/gpu_all.sh kernels stage-bf16    these parts
#   bash perf/gpu_all.sh --list                their names, and what they do
#   bash perf/gpu_all.sh --out DIR ...         results there instead of perf/results
#   bash perf/gpu_all.sh --commit ID ...       what results say where there is no repository
#   bash perf/gpu_all.sh --site DIR ...        a folder of unpacked packages to find as well (pytest, say)
#   bash perf/gpu_all.sh --tiny                rehearse all of it on a CPU with toy shapes; results are thrown away
#
# Every part leaves NAME.json (result, machine, commit) and NAME.log; the exit status is 1 when one failed. PYTHON names
# the interpreter.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

python=${PYTHON:-python3}
tiny=
out=
site=
commit=
limit_s=530
parts=()
all_parts=(card tests multigpu roofline kernels stage-bf16 stage-fp8 decoder transport profile)

describe() {
    cat <<'LIST'
card            the machine and its ceilings: copy bandwidth, matrix products
tests           every test marked gpu, NCCL alone and between two ranks of one GPU among them
multigpu        every test marked multigpu; with one GPU they say that they need two
roofline        the floor of a step from the ceilings of this machine
kernels         every fused op and attention backend against its floor
stage-bf16      the 14B step at 704x384, bfloat16: graph and eager, memory, energy
stage-fp8       the same with eight-bit linears
decoder         12 frames through the Wan VAE and through the light decoder
transport       5 ranks on this machine: hops, and the simulator against them
profile         which kernels a step's time goes into

not in the default run:
kernels-sweep   other tiles than the chosen ones
stage-sparse    the 14B step with a window of two: sink, previous chunk, own chunk
stage-history   the 14B step with an eight-bit history: half the memory of what is remembered
stage-compiled  the 14B step with torch.compile instead of our kernels
train           a step of each recipe of the small preset, and a second of its video
gluon           the experiment with attention in Gluon beside the backends (Hopper, no rehearsal)
decoder-more    the decoder compiled, and its convolutions one by one
LIST
}

fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

while [ $# -gt 0 ]; do
    case $1 in
        --tiny) tiny=1 ;;
        --out) out=${2:?--out needs a folder}; shift ;;
        --site) site=${2:?--site needs a folder}; shift ;;
        --commit) commit=${2:?--commit needs an id}; shift ;;
        --list) describe; exit ;;
        -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
        -*) fail "unknown option $1; see --help" ;;
        *) parts+=("$1") ;;
    esac
    shift
done
[ ${#parts[@]} -gt 0 ] || parts=("${all_parts[@]}")
if [ -n "$tiny" ]; then
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    out=${out:-$scratch}
fi
out=${out:-$root/perf/results}
mkdir -p "$out"
out=$(cd "$out" && pwd)

export PYTHONPATH=$root:$root/kernels${site:+:$(cd "$site" && pwd)}
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUBLAS_WORKSPACE_CONFIG=:4096:8
command -v "$python" >/dev/null || fail "there is no $python; name one in PYTHON"
"$python" -c 'import torch, numpy, safetensors' || fail "$python lacks torch, numpy or safetensors"
if [ -z "$tiny" ]; then
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
        || fail "no CUDA device here; --tiny rehearses everything on a CPU"
fi

# run_tests MARK
run_tests() {
    local mark=$1
    if ! "$python" -c 'import pytest' 2>/dev/null; then
        echo "pytest is not installed; unpack it and its needs (pluggy, iniconfig, packaging) and name the folder in --site"
        return 77
    fi
    local files
    # Only the files that have such tests: others may need packages that are not here.
    mapfile -t files < <(grep -rl --include='test_*.py' "mark\.$mark" tests | sort)
    local options=(-q -p no:cacheprovider -o addopts="--import-mode=importlib" -W ignore::pytest.PytestConfigWarning -rs)
    if [ -n "$tiny" ]; then
        "$python" -m pytest "${options[@]}" -m 'not gpu and not multigpu and not slow' tests/gpu
    else
        "$python" -m pytest "${options[@]}" -m "$mark" "${files[@]}"
    fi
}

# The command of a part; toy shapes when rehearsing.
run_part() {
    case $1 in
        card) "$python" perf/measure.py ;;
        tests) run_tests gpu ;;
        multigpu) run_tests multigpu ;;
        roofline) "$python" perf/roofline.py ;;
        kernels) "$python" perf/bench_kernels.py ${tiny:+--shapes small --budget-s 0.02} ;;
        kernels-sweep) "$python" perf/bench_kernels.py --sweep ${tiny:+--shapes small --budget-s 0.02} ;;
        stage-bf16) stage --precision bf16 ;;
        stage-fp8) stage --precision fp8 ;;
        stage-sparse) stage --window 2 ;;
        train) "$python" perf/bench_train.py ${tiny:+--budget 0.1} ;;
        gluon) "$python" perf/try_gluon.py ;;
        stage-history) stage --history fp8 --precision fp8 ;;
        stage-compiled) stage --compile --precision bf16 ;;
        decoder) "$python" perf/bench_decoder.py ${tiny:+--preset tiny --repeats 2} ;;
        decoder-more) "$python" perf/bench_decoder.py --compile --convolutions ${tiny:+--preset tiny --repeats 2} ;;
        transport) "$python" perf/bench_pipeline.py ${tiny:+--ranks 2 --chunks 12 --work-ms 20} ;;
        profile) "$python" perf/profile_stream.py --step --eager --out "$out/step-trace.json" ${tiny:+--tiny --chunks 1} ;;
        *) fail "there is no part $1; see --list" ;;
    esac
}

stage() { "$python" perf/bench_stage.py "$@" ${tiny:+--tiny --runs 2 --budget-s 0.2}; }

export -f run_part run_tests stage fail
export python tiny out

summary=()
failed=0
for part in "${parts[@]}"; do
    describe | grep -q "^$part " || fail "there is no part $part; see --list"
done
for part in "${parts[@]}"; do
    log=$out/$part.log
    printf '\n== %s\n' "$part"
    start_s=$SECONDS
    status=0
    timeout "$limit_s" bash -c "set -euo pipefail; run_part $part" 2>&1 | tee "$log" || status=${PIPESTATUS[0]}
    if [ "$status" -eq 0 ] && [ "$part" != tests ] && [ "$part" != multigpu ]; then
        "$python" perf/table.py --keep "$part" --results "$out" ${commit:+--commit "$commit"} <"$log" >/dev/null \
            || status=$?
    fi
    case $status in
        0) said=ok ;;
        77) said=skipped ;;
        124) said="stopped after $limit_s s"; failed=1 ;;
        *) said="failed ($status), see $log"; failed=1 ;;
    esac
    summary+=("$(printf '%-15s %4d s  %s' "$part" $((SECONDS - start_s)) "$said")")
done
printf '\n== summary\n'
printf '%s\n' "${summary[@]}"
[ -n "$tiny" ] || echo "results are in $out; python perf/table.py --write puts them into the tables"
exit "$failed"
