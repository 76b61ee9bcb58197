#!/bin/sh
# Makes .venv: pinned dependencies, the protos' stubs, the Python client and the services (both editable).
# `make setup` runs it when something it reads has changed.
set -eu
cd "$(dirname "$0")/.."

say() {
    echo "setup: $*"
}

# No build isolation: the stubs are then built by the grpcio-tools that constraints.txt names.
install() {
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt "$@"
}

python=${PYTHON:-python3}
if ! "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; then
    say "needs Python 3.11 or newer with venv; $python is $("$python" --version 2>&1). Try make setup PYTHON=python3.13" >&2
    exit 1
fi
if [ ! -x .venv/bin/python ]; then
    say "making .venv"
    "$python" -m venv .venv
fi
say "installing what constraints.txt pins; the first time this takes minutes"
install setuptools grpcio-tools mypy-protobuf
install ./protos -e ./clients/python -e '.[dev]'
touch .venv/installed
say "done"
