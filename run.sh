#!/usr/bin/env bash
# ./run.sh                       trains the default config (handwritten digits, included), prints its test accuracy
# ./run.sh --config=CONFIG ...   trains another config: vit-jax train --config=CONFIG ...
# ./run.sh COMMAND ...           runs vit-jax COMMAND ...: predict, evaluate, finetune, ... (./run.sh help lists them)
# ./run.sh test ...              runs the tests (further arguments are passed to pytest)
# The first call creates .venv in this directory; PYTHON=/path/to/python chooses the interpreter.
# After `source .venv/bin/activate`, vit-jax and `import vit_jax` work in every directory.
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
}

# Makes `vit-jax` and `import vit_jax` work in the environment. Both files are relative to it, so that no character of
# a path can break them, and a copy of this directory uses itself. The second line of the script is one for sh, which
# starts the script again with the environment's Python; to Python it is a string.
link_package() {
    "$venv/bin/python" - "$root" <<'PY'
import os, sys, sysconfig

packages = sysconfig.get_path("purelib")
with open(os.path.join(packages, "vit_jax.pth"), "w") as file:
    print(os.path.relpath(sys.argv[1], packages), file=file)
PY
    cat >"$venv/bin/vit-jax" <<'SCRIPT'
#!/bin/sh
'''exec' "$(dirname -- "$(readlink -f -- "$0")")/python" "$0" "$@"
' '''
import sys

from vit_jax.__main__ import main

sys.exit(main())
SCRIPT
    chmod +x "$venv/bin/vit-jax"
}

# What an environment was set up from is stored in it, in a file with the name of the requirements.
contents() { cat "$root/$1" "$root/pyproject.toml" "$root/run.sh"; }

works() { "$venv/bin/python" -c '' 2>/dev/null; }

ready() { contents "$1" 2>/dev/null | cmp -s - "$venv/$1" && works; }

install() {
    # An environment that was complete is updated; after an interruption it is made anew.
    [ -e "$venv/requirements.txt" ] && [ ! -e "$venv/installing" ] && works || make_venv
    : >"$venv/installing"
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check -r "$root/$1" || {
        rm "$venv/installing"
        fail "installing the packages failed (see above); run the command again to retry"
    }
    link_package
    contents requirements.txt >"$venv/requirements.txt"
    contents "$1" >"$venv/$1"
    rm "$venv/installing"
    say "environment is ready"
}

set_up() {
    ready "$1" && return
    case "$root" in *:*) fail "$root has a colon in its name, which Python's environments cannot have; rename it" ;; esac
    [ -w "$root" ] || fail "$root cannot be written to, and its environment (.venv) is not complete; copy it elsewhere"
    # Two first calls at the same time must not install into the same directory.
    if command -v flock >/dev/null; then
        exec 9>"$root/.venv.lock"
        flock 9
        ready "$1" || install "$1"
        exec 9>&-
    else
        install "$1"
    fi
}

vit_jax() { exec "$venv/bin/python" "$venv/bin/vit-jax" "$@"; }

case "${1:-}" in
-h | --help)
    sed -n '2,/^set /s/^# //p' "${BASH_SOURCE[0]}"
    exit
    ;;
test) set_up requirements-dev.txt ;;
*) set_up requirements.txt ;;
esac
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
case "${1:-}" in
"") vit_jax train --config=digits --workdir="$root/runs/digits" ;;
test)
    shift
    cd "$root"
    # Two workers, each runs whole files: mostly they compile, on one core. tests/conftest.py sorts the files.
    exec "$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
    ;;
--version) vit_jax "$@" ;;
-*) vit_jax train "$@" ;;
*) vit_jax "$@" ;;
esac
