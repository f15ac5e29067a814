# Sourced by launch/quickstart.sh and tests/run.sh: `prepare_python [EXTRA]` leaves $PYTHON with hfscale installed in it.
#
# It uses the active environment (venv or conda) if there is one, else .venv in this folder, which it makes.
# Versions are those of constraints.txt. All PIP_* settings and pip's configuration files apply.
#   HFSCALE_VENV=DIR       make or use the environment there instead of .venv
#   HFSCALE_NO_INSTALL=1   install nothing: use the active environment (or python3) as it is, for example with your own torch
# A second run finds its stamp and needs no network.

say() { printf '\033[1m==> %s\033[0m\n' "$*"; }
stop() { printf '%s\n' "$@" >&2; exit 2; }
run() { printf '    $ %s\n' "$*"; "$@"; }

python_fits() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

find_python() {  # a Python that the pins are for, on PATH
    local name
    for name in python3 python3.12 python3.11 python3.10; do
        if python_fits "$name"; then command -v "$name"; return; fi
    done
    stop "No Python 3.10, 3.11 or 3.12 was found on PATH (python3 is: $(python3 --version 2>&1))." \
         "  remedy: install one, on Debian or Ubuntu: apt-get install python3 python3-venv"
}

make_venv() {
    local base version
    base=$(find_python) || exit 2
    version=$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$base" -c 'import ensurepip, venv' 2>/dev/null || stop "Python $version ($base) cannot make environments: a system package is missing." \
        "  remedy: apt-get install python$version-venv    (as root; or activate an environment of your own)"
    say "Making the environment $1 with Python $version"
    run "$base" -m venv "$1"
}

prepare_python() {
    local extra=${1:-} prefix target stamp wanted
    if [ -n "${HFSCALE_NO_INSTALL:-}" ]; then
        PYTHON=$(command -v python || find_python) || exit 2
        export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
        say "Using $PYTHON as it is (HFSCALE_NO_INSTALL is set)"
        return
    fi
    prefix=${HFSCALE_VENV:-${VIRTUAL_ENV:-${CONDA_PREFIX:-}}}
    if [ -n "$prefix" ] && [ -x "$prefix/bin/python" ]; then
        python_fits "$prefix/bin/python" || stop "The active environment $prefix has $("$prefix/bin/python" --version 2>&1); 3.10 to 3.12 is needed." \
            "  remedy: deactivate it (then .venv is made), or activate another"
    else
        prefix=${HFSCALE_VENV:-$PWD/.venv}
        "$prefix/bin/python" -m pip --version >/dev/null 2>&1 || make_venv "$prefix"
    fi
    PYTHON=$prefix/bin/python
    export PATH="$prefix/bin:$PATH"

    stamp=$prefix/.hfscale-installed
    wanted=$({ echo "$PWD"; cat setup.cfg pyproject.toml constraints.txt; } | "$PYTHON" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    if grep -qsx "$wanted $extra" "$stamp" || { [ -z "$extra" ] && grep -qs "^$wanted " "$stamp"; }; then
        say "Using $prefix (already installed)"
        return
    fi
    say "Installing hfscale${extra:+ with its $extra tools} into $prefix (pins: constraints.txt; a few minutes the first time)"
    [ -e /dev/nvidiactl ] || echo "    No GPU here: torch from PyPI may bring several GB of CUDA; PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS can point at CPU wheels instead."
    target=.${extra:+[$extra]}
    # DS_BUILD_OPS=0: DeepSpeed's compiled kernels are optional, and building them needs CUDA's compiler.
    run env DS_BUILD_OPS=0 "$PYTHON" -m pip install --disable-pip-version-check -c constraints.txt -e "$target" || stop "" \
        "The installation failed; pip's message is above." \
        "  remedy: without a network, set PIP_FIND_LINKS or PIP_INDEX_URL to a local mirror; then run this again"
    "$PYTHON" -m launch.cli --help >/dev/null || stop "The installation ended, but the hfscale command does not start; its message is above."
    echo "$wanted $extra" >> "$stamp"
}
