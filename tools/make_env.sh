#!/bin/sh
# make_env.sh PYTHON VENV: the environment that the Makefile runs in.
set -eu
python=$1
venv=$2
"$python" -m venv "$venv"
if "$python" -c "import torch; raise SystemExit(not torch.cuda.is_available())" 2>/dev/null; then
    site=$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    "$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))" >"$site/outer.pth"
    "$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation --editable .
else
    "$venv/bin/python" -m pip install --quiet --constraint constraints.txt --editable '.[examples,dev]'
fi
