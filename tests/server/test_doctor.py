"""``tinker-server doctor``: what it says of machines that are in order, and of those that are not."""

from __future__ import annotations

import configparser
import fcntl
import json
import os
import re
import shlex
import shutil
import socket
import sqlite3
import subprocess
from pathlib import Path

import pytest

from tests.server.test_command import COMMAND, FAKE, environment
from tinker_core.testing.fakes import FAKE_PLUGIN
from tinker_server.cli import main
from tinker_server.doctor import machine, sampler, software, storage


@pytest.fixture(autouse=True)
def only_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_PLUGINS", FAKE_PLUGIN)


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def doctor(capsys: pytest.CaptureFixture[str], data_dir: Path, *flags: str, port: int | None = None) -> dict[str, str]:
    """The level of each check; the worst of several lines of one check."""
    where = ["--data-dir", str(data_dir), "--port", str(port or unused_port())]
    status = main(["doctor", "--json", *FAKE, *where, *flags])
    findings = json.loads(capsys.readouterr().out)
    levels: dict[str, str] = {}
    for finding in findings:
        assert bool(finding["fix"]) == (finding["level"] != "ok")
        worst = ["ok", "warn", "fail"]
        levels[finding["check"]] = max(levels.get(finding["check"], "ok"), finding["level"], key=worst.index)
    assert status == ("fail" in levels.values())
    return levels


def run_once(data_dir: Path) -> None:
    """Leave what a server leaves."""
    command = [*COMMAND, *FAKE, "--data-dir", str(data_dir), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stderr is not None
        assert any("ready on" in line for line in process.stderr)
        process.terminate()
        assert process.wait(60) == 0


def test_everything_is_looked_at_before_and_after_a_server_has_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = doctor(capsys, tmp_path / "data")
    assert set(before.values()) <= {"ok", "warn"}
    assert not (tmp_path / "data").exists()
    run_once(tmp_path / "data")
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*") if path.is_file()}
    after = doctor(capsys, tmp_path / "data")
    assert {"python", "packages", "plugins", "settings", "device", "memory", "open files", "port"} <= set(before)
    assert {"disk", "file system", "fsync", "clock", "lock", "control database", "journal", "checkpoints"} <= set(after)
    assert "fail" not in after.values()
    still = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*") if path.is_file()}
    assert {path: still.get(path) for path in left if "-shm" not in path.name} == {
        path: time for path, time in left.items() if "-shm" not in path.name
    }


def test_a_newer_database_and_a_damaged_journal_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_once(tmp_path)
    with sqlite3.connect(tmp_path / "control.sqlite") as control:
        control.execute("UPDATE alembic_version SET version_num = '9999'")
    control.close()
    with sqlite3.connect(tmp_path / "journal" / "journal.sqlite") as journal:
        journal.execute("UPDATE totals SET live = live + 1")
    journal.close()
    levels = doctor(capsys, tmp_path)
    assert (levels["control database"], levels["journal"]) == ("fail", "fail")
    with sqlite3.connect(tmp_path / "journal" / "journal.sqlite") as journal:
        journal.execute("UPDATE meta SET version = 99")
    journal.close()
    assert doctor(capsys, tmp_path)["journal"] == "fail"


def test_a_taken_port_is_a_failure_unless_the_server_itself_has_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert doctor(capsys, tmp_path, port=port)["port"] == "fail"
        with (tmp_path / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert doctor(capsys, tmp_path, port=port)["port"] == "ok"


def test_settings_that_cannot_work_and_stores_that_are_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(capsys, tmp_path, "--max-models", "0")["settings"] == "fail"
    assert doctor(capsys, tmp_path, "--database-url", "postgresql://nobody@127.0.0.1:1/none")["settings"] == "ok"
    assert doctor(capsys, tmp_path, "--database-url", "nonsense://")["control database"] == "fail"
    assert doctor(capsys, tmp_path, "--checkpoint-store", "nonsense://bucket")["checkpoints"] == "fail"
    assert doctor(capsys, tmp_path, "--checkpoint-store", f"file://{tmp_path}/elsewhere")["checkpoints"] == "ok"


def test_the_report_for_people_names_the_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        ["doctor", "--backend", "fake", "--sampler", "fake", "--data-dir", str(tmp_path), "--port", str(unused_port())]
    )
    lines = capsys.readouterr().out.splitlines()
    [number] = [number for number, line in enumerate(lines) if "no base model is given" in line]
    assert lines[number].startswith("warn  settings")
    assert "-> give the doctor the flags" in lines[number + 1]


def test_a_missing_package_and_an_old_one_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["attrs>=24", "orjson<1", "acme-nowhere>=2", "left-out; extra == 'x'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: wanted)
    failed = [finding for finding in software.check_packages(["tinker-core"]) if finding.level == "fail"]
    assert [finding.fix for finding in failed] == ["pip install 'orjson<1'", "pip install 'acme-nowhere>=2'"]


def test_little_memory_few_files_and_a_clock_that_went_back(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 8000000 kB\nMemFree: 1 kB\nMemAvailable: 1000000 kB\n")
    assert [finding.level for finding in machine.check_memory(meminfo)] == ["warn"]
    assert [finding.level for finding in machine.check_files(10**9)] == ["warn"]
    os.utime(meminfo, (4e9, 4e9))
    assert [finding.level for finding in machine.check_clock(tmp_path)] == ["fail"]


def test_a_file_system_is_told_by_the_mount_that_is_nearest(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"a / ext4 rw 0 0\nb {tmp_path.parent} nfs4 rw 0 0\nc {tmp_path}x xfs rw 0 0\n")
    assert storage.file_system_of(tmp_path, mounts) == "nfs4"
    assert storage.file_system_of(Path("/"), mounts) == "ext4"


@pytest.mark.parametrize(
    ("free", "kind", "level"), [(2 << 30, "tmpfs", "ok"), (64 << 20, "tmpfs", "warn"), (2 << 30, "ext4", "warn")]
)
def test_weights_that_are_handed_over_need_room_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, kind: str, level: str
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"a {tmp_path} {kind} rw 0 0\n")
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
    [found] = sampler.check_handoff(tmp_path, 64, mounts)
    assert (found.level, f"{free / 2**30:.2f} GiB" in found.text) == (level, True)
    [missing] = sampler.check_handoff(tmp_path / "missing", 64, mounts)
    assert missing.level == "fail"


def test_the_unit_runs_this_server_with_these_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a b").mkdir()
    flags = [*FAKE[:-1], f"50%={tmp_path}/a b", "--data-dir", str(tmp_path), "--grace-seconds", "100"]
    assert main(["doctor", "--systemd", *flags]) == 0
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(capsys.readouterr().out)
    service = unit["Service"]
    program, *words = shlex.split(service["ExecStart"].replace("%%", "%"))
    assert Path(program).name == "tinker-server"
    assert words == flags
    assert service["KillMode"] == "mixed"
    assert int(service["TimeoutStopSec"]) > 100
    assert service["RestartPreventExitStatus"] == "2"
    assert service["ReadWritePaths"] == str(tmp_path)
    assert re.fullmatch(r"[1-9]\d+", service["LimitNOFILE"])
    capsys.readouterr()
    assert main(["doctor", "--systemd", *FAKE, "--data-dir", str(tmp_path), "--handoff-dir", "/mnt/memory"]) == 0
    assert f"ReadWritePaths={tmp_path} /mnt/memory\n" in capsys.readouterr().out
