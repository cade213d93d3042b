# Sourced by carve3d_train.sh and tests/run.sh from the repository's root:
#   setup_env      makes $VENV (.venv, or CARVE3D_VENV) hold exactly requirements.txt, or says what is missing
#   $VENV_PYTHON   its interpreter
# CARVE3D_VENV=system is the python3 on PATH with what it has, such as a torch for this machine: nothing is installed.
# A stamp with the hash of requirements.txt makes the second call a matter of milliseconds. While something is being
# installed a marker stands in the folder: an environment that still has it was interrupted and is made anew.

VENV="${CARVE3D_VENV:-.venv}"
VENV_PYTHON="$VENV/bin/python"
if [ "$VENV" = system ]; then
    VENV_PYTHON=python3
fi

fail() {  # as a mistake that the user can mend ends every command
    echo "error: $*" >&2
    exit 2
}

find_python() {  # prints the first interpreter that is new enough
    local candidate
    for candidate in python3.11 python3 python3.12 python3.13; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed and was not found ($(python3 --version 2>&1 || true)): install python3.11 and run this again"
}

setup_env() {
    if [ "$VENV" = system ]; then
        check_system
        return
    fi
    local stamp="$VENV/.carve3d_ready" marker="$VENV/.carve3d_installing" ours="$VENV/.carve3d_made" wanted python
    wanted="$(cksum < requirements.txt)"
    if is_ready; then
        return
    fi
    if command -v flock >/dev/null; then  # two commands started together must not install into each other
        exec 9>.setup.lock
        flock 9
    fi
    if ! is_ready; then
        if [ -e "$marker" ]; then
            echo "An earlier set-up was interrupted: making $VENV anew."
            rm -rf "$VENV"
        fi
        if [ ! -x "$VENV_PYTHON" ]; then
            python="$(find_python)" || exit 1
            echo "Making the environment $VENV with $("$python" --version)."
            { mkdir -p "$VENV" && touch "$ours" "$marker"; } 2>/dev/null ||
                fail "the environment cannot be made in $VENV, which is a file or cannot be written: set CARVE3D_VENV to another folder"
            "$python" -m venv "$VENV" ||
                fail "$python cannot make environments: install its venv package (Debian, Ubuntu: apt install python3-venv) and run this again"
        fi
        if [ -e "$ours" ]; then  # somebody else's environment (CARVE3D_VENV) gets no marker: it is never removed
            touch "$marker"
        fi
        echo "Installing requirements.txt; the first time this takes some minutes, most of them for torch."
        if ! "$VENV_PYTHON" -m pip install --disable-pip-version-check -r requirements.txt; then
            rm -f "$marker"  # pip leaves nothing half-installed when it fails by itself
            fail "the packages of requirements.txt could not be installed (see above): check the network and free disk space, and run this again"
        fi
        echo "$wanted" > "$stamp"
        rm -f "$marker"
    fi
    if command -v flock >/dev/null; then
        exec 9>&-
    fi
}

check_system() {  # names what requirements.txt has before its first empty line and the Python on PATH has not
    command -v "$VENV_PYTHON" >/dev/null || fail "CARVE3D_VENV=system, and there is no python3 on PATH"
    "$VENV_PYTHON" - <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version

lines = open("requirements.txt").read().split("\n\n")[0].splitlines()
missing, other = [], []
for name, _, wanted in (line.partition("==") for line in lines if line and not line.startswith("#")):
    try:
        found = version(name)
        if found.partition("+")[0] != wanted:
            other.append(f"{name} {found} instead of {wanted}")
    except PackageNotFoundError:
        missing.append(name)
if sys.version_info < (3, 11):
    missing.insert(0, "Python 3.11 or newer")
if missing:
    sys.exit(f"error: CARVE3D_VENV=system: {sys.executable} lacks {', '.join(missing)}: install that there, or unset "
             "CARVE3D_VENV to have an environment made")
if other:
    print(f"note: {sys.executable} has {', '.join(other)}", file=sys.stderr)
PYTHON
}

is_ready() {  # with setup_env's variables
    [ -x "$VENV_PYTHON" ] && [ ! -e "$marker" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]
}
