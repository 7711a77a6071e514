#!/usr/bin/env bash
# Find or make a Python environment, then hand over to lesslib/run.py: ./run_all.sh --help
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
has_packages='import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in ("torch", "transformers", "papermill", "nbval", "jupyterlab")))'

if [ -n "${LESS_PYTHON:-}" ]; then
  python=$LESS_PYTHON
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "LESS_PYTHON=$python is not a Python 3.11 or newer: correct it, or unset it" >&2; exit 2; }
elif [ -n "${CONDA_PREFIX:-}" ] && "$CONDA_PREFIX/bin/python" -c "$has_packages" 2>/dev/null; then
  python=$CONDA_PREFIX/bin/python
else
  venv=$here/.venv python=$here/.venv/bin/python
  wanted=$({ echo "$here"; cat "$here/environment.yml" "$here/pyproject.toml"; } | cksum)
  if [ "$(cat "$venv/.stamp" 2>/dev/null)" != "$wanted" ]; then
    python3 -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
      echo "python3 is missing, older than 3.11 or without its venv module: install Python 3.11 with venv (on Debian and Ubuntu, python3-venv)," \
        "or set LESS_PYTHON, or run conda env create -f environment.yml and activate less" >&2; exit 2; }
    echo "installing what environment.yml lists into $venv (once; a minute or two, by the network)" >&2
    [ -f "$venv/.stamp" ] && rm "$venv/.stamp" || python3 -m venv --clear "$venv"  # without a stamp, an install was cut short
    requirements=$(sed -n '/^ *- pip:/,$ s/^ *- \([^ #]*==[^ #]*\).*/\1/p' "$here/environment.yml")
    "$python" -m pip install --quiet --disable-pip-version-check $requirements
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps -e "$here"
    echo "$wanted" > "$venv/.stamp"
  fi
fi
exec "$python" -m lesslib.run "$@"
