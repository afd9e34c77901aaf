#!/usr/bin/env bash
# ./run.sh            trains the default config (handwritten digits, included) and prints its test accuracy
# ./run.sh test ...   runs the tests (further arguments are passed to pytest)
# ./run.sh ARGS...    runs python -m vit_jax.main ARGS...
# The first call creates .venv in this directory; PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
venv="$root/.venv"

say() { printf 'run.sh: %s\n' "$*" >&2 || true; } # standard error may be closed

fail() {
    say "$@"
    exit 2
}

find_python() {
    local name
    for name in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            printf '%s\n' "$name"
            return
        fi
        [ -z "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is not Python 3.11 or newer"
    done
    fail "Python 3.11 or newer was not found; install it, or give its path: PYTHON=/path/to/python ./run.sh"
}

make_venv() {
    local python
    python=$(find_python)
    say "setting up $venv with $("$python" --version 2>&1) (once; about a minute and 1.2 GB)"
    rm -rf "$venv"
    "$python" -m venv "$venv" >/dev/null 2>&1 || {
        rm -rf "$venv"
        fail "$python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"
    }
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check -r "$root/requirements.txt" ||
        fail "installing the packages failed (see above); run the command again to retry"
    cp "$root/requirements.txt" "$venv/requirements.txt" # written last: marks a complete set-up
    say "environment is ready"
}

ready() {
    cmp -s "$root/requirements.txt" "$venv/requirements.txt" && "$venv/bin/python" -c '' 2>/dev/null
}

set_up() {
    ready && return
    case "$root" in *:*) fail "$root has a colon in its name, which Python's environments cannot have; rename it" ;; esac
    [ -w "$root" ] || fail "$root cannot be written to, and has no environment (.venv) yet; copy it to another place"
    # Two first calls at the same time must not install into the same directory.
    if command -v flock >/dev/null; then
        exec 9>"$root/.venv.lock"
        flock 9
        ready || make_venv
        exec 9>&-
    else
        make_venv
    fi
}

set_up
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
case "${1:-}" in
"") exec "$venv/bin/python" -m vit_jax.main --config="$root/configs/digits.py" --workdir="$root/runs/digits" ;;
test)
    shift
    cd "$root"
    # Two workers, each runs whole files: mostly they compile, on one core. tests/conftest.py sorts the files.
    exec "$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
    ;;
*) exec "$venv/bin/python" -m vit_jax.main "$@" ;;
esac
