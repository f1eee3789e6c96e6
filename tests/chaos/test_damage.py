"""A flipped byte is found, named and never applied; a full disk fails what needs it and corrupts nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest
import tinker

from tests.chaos.client import ADAM, API_KEY, datum, row
from tests.chaos.command import Command
from tests.chaos.run import Setup, fake_setup
from tinker_core.testing.fakes import FAKE_PLUGIN

pytestmark = pytest.mark.filterwarnings("ignore:DEPRECATED. TrainingClient.load_state:FutureWarning")

RARELY = ("--snapshot-steps", "1000000", "--snapshot-seconds", "1000000")
ENVIRONMENT = {"TINKER_PLUGINS": FAKE_PLUGIN}
MARK = [57, 58, 59, 56, 57, 55, 59, 58, 57, 56, 55, 59]
"""Tokens of one request, to be found in the files."""


class Damaged:
    """A server that is stopped the hard way, changed, and started again."""

    def __init__(self, directory: Path, setup: Setup) -> None:
        self.data_dir = directory / "data"
        self._changes: Callable[[], None] = lambda: None
        self.command = Command(
            *setup.flags,
            data_dir=self.data_dir,
            log=directory / "server.log",
            environment=ENVIRONMENT,
            between_lives=lambda: self._changes(),
            max_fruitless=1,
        )

    def restart(self, change: Callable[[], None]) -> None:
        """Kill all of it, change files, and wait until it is ready again."""
        self._changes = change  # an exception in it ends the command, and with it the wait
        self.command.forget_ready()
        self.command.kill("all")
        self.command.wait_ready()


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[Callable[..., Damaged]]:
    with ExitStack() as stack:

        def start(*flags: str) -> Damaged:
            found = Damaged(tmp_path, fake_setup(*flags))
            stack.enter_context(found.command)
            found.command.wait_ready()
            return found

        yield start


def flip(path: Path, offset: int) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        [byte] = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def last_frame(log: Path) -> int:
    """Where the last frame of SQLite's write-ahead log begins; what is behind it is left from an earlier round."""
    content = log.read_bytes()
    size = 24 + int.from_bytes(content[8:12], "big")
    frames = range(32, len(content) - size + 1, size)
    return max(frame for frame in frames if content[frame + 8 : frame + 16] == content[16:24])


def two_models(url: str, stack: ExitStack) -> list[tinker.TrainingClient]:
    """Models in sessions of their own."""
    services = [stack.enter_context(tinker.ServiceClient(base_url=url, api_key=API_KEY)) for _ in range(2)]
    return [service.create_lora_training_client(base_model="tiny", rank=4, seed=7).result() for service in services]


def step(model: tinker.TrainingClient, tokens: list[int]) -> float:
    """One step; its gradient norm."""
    passed = model.forward_backward([datum(tokens)], "cross_entropy")
    stepped = model.optim_step(ADAM)
    passed.result()
    return float((stepped.result().metrics or {})["grad_norm"])


def plain(seed: int) -> list[int]:
    return row(np.random.default_rng(seed), 12)


def expect_damage(model: tinker.TrainingClient, named: str) -> None:
    """Whatever is asked of the model fails, and says why."""
    for ask in (
        lambda: model.forward_backward([datum(plain(9))], "cross_entropy").result(),
        lambda: model.save_state("after").result(),
    ):
        with pytest.raises(tinker.RequestFailedError, match=named):
            ask()


def test_a_flipped_byte_in_a_request_is_never_applied(damaged: Callable[..., Damaged]) -> None:
    server = damaged(*RARELY)
    with ExitStack() as stack:
        hit, spared = two_models(server.command.url, stack)
        expected = []
        for seed in range(3):
            step(hit, MARK if seed == 1 else plain(seed))
            expected.append(step(spared, plain(seed)))

        def change() -> None:
            pattern = re.escape(np.array(MARK[:-1], np.int32).tobytes())
            found = 0
            for path in sorted((server.data_dir / "journal").rglob("*")):
                if path.is_file():
                    for place in re.finditer(pattern, path.read_bytes(), re.DOTALL):
                        if not path.name.endswith("-wal"):
                            flip(path, place.start() + 4)
                            found += 1
            assert found, "the request is nowhere in the journal"

        _checkpoint_journal_on_kill(server, change)
        expect_damage(hit, "damaged")
        assert step(spared, plain(4)) > 0
        assert "damaged" in server.command.tail(500)


def _checkpoint_journal_on_kill(server: Damaged, change: Callable[[], None]) -> None:
    """Restart with the journal's log written back into its database, so that there is one copy of each record."""
    import sqlite3

    def both() -> None:
        for path in (server.data_dir / "journal").rglob("*.sqlite"):
            connection = sqlite3.connect(path)
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            connection.close()
        change()

    server.restart(both)


def test_a_flipped_byte_in_a_snapshot_is_never_applied(damaged: Callable[..., Damaged]) -> None:
    server = damaged("--snapshot-steps", "1", "--snapshot-seconds", "1")
    with ExitStack() as stack:
        hit, spared = two_models(server.command.url, stack)
        for seed in range(3):
            step(hit, plain(seed))
            step(spared, plain(seed))
        # A load forces a snapshot before its future completes.
        for model in (hit, spared):
            model.load_state_with_optimizer(model.save_state("state").result().path).result()

        def change() -> None:
            [directory] = (server.data_dir / "snapshots").glob(f"*{hit.model_id.split(':')[0]}*")
            for path in directory.rglob("*.npz"):
                flip(path, path.stat().st_size // 2)

        server.restart(change)
        expect_damage(hit, "damaged")
        assert step(spared, plain(4)) > 0


def test_a_flipped_byte_in_the_log_of_the_journal_stops_the_server(damaged: Callable[..., Damaged]) -> None:
    server = damaged(*RARELY)
    with ExitStack() as stack:
        model, _ = two_models(server.command.url, stack)
        step(model, plain(0))

    def change() -> None:
        [log] = (server.data_dir / "journal").rglob("*-wal")
        flip(log, last_frame(log) + 100)

    with pytest.raises(RuntimeError, match="has lost what it had promised to keep"):
        server.restart(change)


def test_a_flipped_byte_in_a_checkpoint_is_never_loaded(damaged: Callable[..., Damaged]) -> None:
    server = damaged(*RARELY)
    with ExitStack() as stack:
        hit, spared = two_models(server.command.url, stack)
        step(hit, plain(0))
        path = hit.save_state("state").result().path
        for file in (server.data_dir / "checkpoints").rglob("weights.npz"):
            flip(file, file.stat().st_size // 2)
        with pytest.raises(tinker.RequestFailedError, match=r"(?i)damaged|checksum"):
            hit.load_state_with_optimizer(path).result()
        assert step(spared, plain(1)) > 0
        assert step(hit, plain(2)) > 0


# --- a full disk ------------------------------------------------------------------------------------------------------

DISK = "48m"


def _namespace() -> list[str]:
    """How to run a command with mounts of its own; skips the test where that is not allowed."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("needs the command unshare, for a small file system of its own")
    for flags in (["-m"], ["-r", "-m"]):
        probe = [unshare, *flags, "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
        if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            return [unshare, *flags]
    pytest.skip("this user may not mount a small file system, not even in a namespace")


class SmallDisk:
    """A directory of a running command that is a file system of its own, seen from outside."""

    def __init__(self, command: Command, mounted: Path) -> None:
        tree = command.tree()
        assert tree is not None
        self._path = Path(f"/proc/{tree.supervisor}/root{mounted}")

    def fill(self) -> None:
        """Take all room, to the last byte."""
        with (self._path / "ballast").open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                try:
                    while True:
                        file.write(b"\0" * size)
                except OSError:
                    continue

    def empty(self) -> None:
        """Give it back."""
        (self._path / "ballast").unlink()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Callable[[str], tuple[Command, SmallDisk]]]:
    """Starts a server one of whose directories is a small file system."""
    namespace, data_dir = _namespace(), tmp_path / "data"
    with ExitStack() as stack:

        def start(name: str) -> tuple[Command, SmallDisk]:
            mounted = data_dir / name
            mounted.mkdir(parents=True)
            script = f'mount -t tmpfs -o size={DISK} tmpfs {mounted} && exec "$@"'
            command = Command(
                *fake_setup("--snapshot-steps", "2", "--snapshot-seconds", "1").flags,
                data_dir=data_dir,
                log=tmp_path / "server.log",
                environment=ENVIRONMENT,
                prefix=[*namespace, "sh", "-c", script, "sh"],
            )
            stack.enter_context(command).wait_ready()
            return command, SmallDisk(command, mounted)

        yield start


def names_of(command: Command) -> list[str]:
    """Names of the listed checkpoints."""
    listed = httpx.get(f"{command.url}/api/v1/checkpoints", headers={"x-api-key": API_KEY}).raise_for_status().json()
    return sorted(found["tinker_path"].rpartition("/")[2] for found in listed["checkpoints"])


StartSmall = Callable[[str], tuple[Command, SmallDisk]]


def test_a_full_disk_fails_saves_with_the_cause_and_training_goes_on(small: StartSmall) -> None:
    command, disk = small("checkpoints")
    with ExitStack() as stack:
        model, undisturbed = two_models(command.url, stack)
        norms = [step(model, plain(0))]
        first = model.save_state("first").result().path
        disk.fill()
        with pytest.raises(tinker.RequestFailedError, match=r"(?i)no space"):
            model.save_state("second").result()
        norms.append(step(model, plain(1)))
        assert names_of(command) == ["first"]
        disk.empty()
        assert model.save_state("second").result().path.endswith("/second")
        norms.append(step(model, plain(2)))
        assert norms == [step(undisturbed, plain(seed)) for seed in range(3)]
        model.load_state_with_optimizer(first).result()
        assert step(model, plain(1)) == norms[1]
        assert names_of(command) == ["first", "second"]


def test_without_room_for_the_journal_training_waits_until_there_is_some(small: StartSmall) -> None:
    command, disk = small("")
    with ExitStack() as stack:
        model, undisturbed = two_models(command.url, stack)
        norms = [step(model, plain(0))]
        disk.fill()
        session_id = model.model_id.partition(":")[0]
        _use_up(command.url, session_id)
        waiting = threading.Thread(target=lambda: norms.append(step(model, plain(1))))
        waiting.start()
        assert _create(command.url, session_id, 99, "x" * 100_000) == 503
        disk.empty()
        waiting.join(timeout=100)
        assert norms == [step(undisturbed, plain(seed)) for seed in range(2)]


def _use_up(url: str, session_id: str) -> None:
    """Send requests until the journal has given away what it had held back, too."""
    number = 1
    while _create(url, session_id, number, "x" * 100_000) != 503:
        number += 1


def _create(url: str, session_id: str, number: int, note: str) -> int:
    """The status of a request for a new model."""
    body = {"session_id": session_id, "model_seq_id": number, "base_model": "tiny", "lora_config": {"rank": 4}}
    with httpx.Client(base_url=f"{url}/api/v1", headers={"x-api-key": API_KEY}, timeout=60.0) as http:
        return http.post("/create_model", json={**body, "user_metadata": {"note": note}}).status_code
