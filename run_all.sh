#!/usr/bin/env bash
# Find or make a Python environment, then hand over to lesslib/run.py: ./run_all.sh --help
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
venv=$here/.venv
# of an environment that was installed whole: the digest of what it was made from
stamp=$venv/.stamp

# Whether a Python is new enough, and (the second) can make environments.
is_new='import sys; sys.exit(sys.version_info < (3, 11))'
makes_venvs='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'
has_packages='
import sys
from importlib.util import find_spec
names = "torch", "transformers", "numba", "papermill", "nbval", "jupyterlab"
sys.exit(any(find_spec(name) is None for name in names))'

fail() {
  echo "$*" >&2
  exit 2
}

# Install what environment.yml lists into .venv, unless that was done.
make_venv() {
  local wanted requirements
  wanted=$({ echo "$here"; cat "$here/environment.yml" "$here/pyproject.toml"; } | cksum)
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  python3 -c "$makes_venvs" 2>/dev/null || fail \
    "python3 is missing, older than 3.11 or without its venv module:" \
    "install Python 3.11 with venv (on Debian and Ubuntu, python3-venv), or set LESS_PYTHON," \
    "or run conda env create -f environment.yml and activate less"
  echo "installing what environment.yml lists into $venv" \
    "(once; a minute or two, by the network)" >&2
  if [ -f "$stamp" ]; then
    # The list has changed.
    rm "$stamp"
  else
    # There is no environment, or its install was cut short.
    python3 -m venv --clear "$venv"
  fi
  # The lines "- name==version" below "- pip:".
  requirements=$(sed -n '/^ *- pip:/,$ s/^ *- \([^ #]*==[^ #]*\).*/\1/p' "$here/environment.yml")
  # shellcheck disable=SC2086  (a word each)
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check $requirements
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -e "$here"
  echo "$wanted" > "$stamp"
}

if [ -n "${LESS_PYTHON:-}" ]; then
  python=$LESS_PYTHON
  "$python" -c "$is_new" ||
    fail "LESS_PYTHON=$python is not a Python 3.11 or newer: correct it, or unset it"
elif [ -n "${CONDA_PREFIX:-}" ] && "$CONDA_PREFIX/bin/python" -c "$has_packages" 2>/dev/null; then
  python=$CONDA_PREFIX/bin/python
else
  make_venv
  python=$venv/bin/python
fi
exec "$python" -m lesslib.run "$@"
