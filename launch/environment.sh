# Makes .venv beside the project and installs into it. Sourced by the other scripts; runs on a machine that has nothing
# but Python 3.11 or newer and pip.
#
#   STREAMDIFF_PYTHON   interpreter to use (default: the newest of python3.13 ... python3.11, python3)
#   STREAMDIFF_TORCH    torch requirement to install (default: the tested CPU build, or PyPI's CUDA build with a GPU)
#   STREAMDIFF_VENV     where the environment goes (default: .venv)

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=${STREAMDIFF_VENV:-"$root/.venv"}
tested_torch=2.13.0

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

# install NAME REQUIREMENT...: once, and again whenever pyproject.toml changes.
install() {
    local name=$1 stamp
    shift
    stamp="$venv/.installed-$name-$(cksum pyproject.toml | cut -d' ' -f1)"
    make_venv
    [ -e "$stamp" ] && return
    "$venv/bin/python" -m pip install --quiet --upgrade "pip>=25.1"
    install_torch
    say "Installing streamdiff ($name)"
    "$venv/bin/python" -m pip install --quiet "$@"
    touch "$stamp"
}
