# Makes .venv beside the project and installs into it. Sourced by the other scripts; runs on a machine that has nothing
# but Python 3.11 or newer and pip.
#
#   STREAMDIFF_PYTHON   interpreter to use (default: the newest of python3.13 ... python3.11, python3)
#   STREAMDIFF_TORCH    torch requirement to install (default: the tested CPU build, or PyPI's CUDA build with a GPU)
#   STREAMDIFF_VENV     where the environment goes (default: .venv)
#   STREAMDIFF_LOCKED   1: install the versions of launch/tested.txt, compared with their SHA-256, and no others; torch is
#                       the tested one, or that of STREAMDIFF_TORCH, without a hash

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=${STREAMDIFF_VENV:-"$root/.venv"}
tested_torch=2.13.0
tested_cyclonedx=7.5.0
locked_extras=avatar,demo,encoders,listen,think,serve,trust

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

find_python() {
    local candidate
    for candidate in "${STREAMDIFF_PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer was found; install one, or name it in STREAMDIFF_PYTHON"
}

make_venv() {
    local python
    python=$(find_python)
    [ -x "$venv/bin/python" ] && return
    say "Making an environment in $venv with $("$python" --version)"
    if ! "$python" -m venv "$venv" 2>/dev/null; then
        # Debian ships Python without ensurepip; virtualenv brings its own.
        rm -rf "$venv"
        "$python" -m pip install --quiet --target "$venv-tools" virtualenv \
            || fail "cannot make a virtual environment; install python3-venv or virtualenv"
        PYTHONPATH="$venv-tools" "$python" -m virtualenv --quiet "$venv"
        rm -rf "$venv-tools"
    fi
}

has_nvidia_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; }

install_torch() {
    "$venv/bin/python" -c 'import torch' 2>/dev/null && return
    if [ -n "${STREAMDIFF_TORCH:-}" ]; then
        "$venv/bin/python" -m pip install "$STREAMDIFF_TORCH"
    elif has_nvidia_gpu; then
        say "Installing torch with CUDA"
        "$venv/bin/python" -m pip install --quiet "torch>=$tested_torch"
    elif [ "$(uname -s)" != Linux ]; then
        "$venv/bin/python" -m pip install --quiet "torch==$tested_torch"
    else
        say "No NVIDIA GPU here: installing the CPU build of torch $tested_torch"
        "$venv/bin/python" -m pip install --quiet "torch==$tested_torch+cpu" 2>/dev/null \
            || "$venv/bin/python" -m pip install --quiet "torch==$tested_torch" \
                --index-url https://download.pytorch.org/whl/cpu \
            || fail "cannot install torch $tested_torch; see https://pytorch.org and set STREAMDIFF_TORCH"
    fi
}

# install_locked: the packages of the lock file, then this project without asking for anything else.
install_locked() {
    local made_for here
    here=$("$venv/bin/python" -c 'import platform as p; print(f"Python {p.python_version().rpartition(chr(46))[0]}, {p.system()} {p.machine()}")')
    made_for=$(sed -n '1s/.* for \(.*\)\. STREAMDIFF.*/\1/p' launch/tested.txt)
    [ "$here" = "$made_for" ] || fail "launch/tested.txt was made for $made_for, this is $here; make one with launch/lock.sh"
    "$venv/bin/python" -m pip install --quiet --require-hashes --no-deps --only-binary :all: -r launch/tested.txt
    "$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation -e .
    "$venv/bin/python" -m pip check >&2 || fail "launch/tested.txt does not have all that pyproject.toml asks for; see launch/lock.sh"
}

# install NAME REQUIREMENT...: once, and again whenever pyproject.toml changes.
install() {
    local name=$1 stamp
    shift
    stamp="$venv/.installed-$name-$(cksum pyproject.toml | cut -d' ' -f1)"
    make_venv
    [ -e "$stamp" ] && return
    if [ -n "${STREAMDIFF_LOCKED:-}" ]; then
        [ "$name" != dev ] || fail "launch/tested.txt has nothing of the dev group; leave STREAMDIFF_LOCKED out"
        install_torch
        say "Installing streamdiff ($name) as launch/tested.txt says"
        install_locked
    else
        "$venv/bin/python" -m pip install --quiet --upgrade "pip>=25.1"
        install_torch
        say "Installing streamdiff ($name)"
        "$venv/bin/python" -m pip install --quiet "$@"
    fi
    touch "$stamp"
}
