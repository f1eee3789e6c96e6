#!/usr/bin/env bash
# Installs into .cache/venv, then runs the linters, the type checker and the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

environment requirements/server.txt requirements/tests.txt
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY=PASSIVE
say "ruff"
ruff check --quiet .
ruff format --quiet --check .
say "mypy"
mypy packages
say "pytest"
exec python -m pytest --quiet "$@"
