"""``tinker-server jobs``: its arguments alone, and the command against a real server."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shlex
import socket
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.jobs.conftest import JobServer
from tests.jobs.cut_connections import cutting_relay
from tests.jobs.hosting import JobsApi, serve_jobs
from tests.server.tenants import make_key
from tinker_core.rewards import Judged, RewardRecipePlugin
from tinker_jobs.cli.command import make_jobs_parser
from tinker_jobs.cli.flags import KINDS, RequestFlag, request_flags
from tinker_jobs.cli.manifest import make_request
from tinker_jobs.environments.names import ENVIRONMENT_RECIPES
from tinker_jobs.recipes import BUILT_IN
from tinker_jobs.requests import REQUEST_KINDS, as_sent, parse
from tinker_server.cli import main

Run = Callable[..., str]


def sample_of(flag: RequestFlag, kind: str) -> tuple[str, Any]:
    """A value as it is written and as it is sent."""
    if flag.choices:
        legal = {"rl": ("ppo", "fully_async"), "grpo": ("grpo", "distributed")}[kind]
        return next((choice, choice) for choice in flag.choices if choice in legal)
    if flag.path[-1] == "params":
        return '{"needle": "x"}', {"needle": "x"}
    return {
        "N": ("3", 3),
        "X": ("0.5", 0.5),
        "TEXT": ("some text", "some text"),
        "NAME": ("contains_v1", "contains_v1"),
        "NAME@VERSION": ("local/it@1.0", {"name": "local/it", "version": "1.0"}),
    }[str(flag.metavar)]


def fields_of(kind: str) -> set[tuple[str, ...]]:
    model = REQUEST_KINDS[KINDS[kind]]
    config: Any = model.model_fields["config"].annotation
    own = {(name,) for name in model.model_fields if name not in ("backend", "trainer_type", "config")}
    return own | {("config", name) for name in config.model_fields}


def flags_of(kind: str) -> list[RequestFlag]:
    return [flag for flag in request_flags() if not flag.kinds or kind in flag.kinds]


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_flags_are_one_to_one_with_the_fields(kind: str) -> None:
    paths = [flag.path for flag in flags_of(kind) if flag.path[-1] != "params"]
    assert sorted(paths) == sorted(fields_of(kind))
    params = [flag.path[:-1] for flag in flags_of(kind) if flag.path[-1] == "params"]
    assert params == [("config", name) for name in ("reward_recipe", "world_reward") if ("config", name) in paths]


def test_no_two_flags_are_called_the_same() -> None:
    names = [flag.flag for flag in request_flags()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("kind", KINDS)
def test_all_flags_together_are_a_request_with_all_fields(kind: str) -> None:
    arguments, expected = ["submit", kind], dict[str, Any]()
    for flag in flags_of(kind):
        text, value = sample_of(flag, kind)
        arguments += [flag.flag, text] * (2 if flag.is_list else 1)
        expected[flag.dest] = [value, value] if flag.is_list else value
    request = as_sent(parse(make_request(kind, vars(make_jobs_parser().parse_args(arguments)))))
    sent = {**request, **{f"config.{name}": value for name, value in request.pop("config").items()}}
    for name in ("reward_recipe", "world_reward"):
        if (record := sent.get(f"config.{name}")) is not None:
            sent[f"config.{name}"], sent[f"config.{name}.params"] = record["name"], record["params"]
    assert (sent.pop("backend"), sent.pop("trainer_type")) == KINDS[kind]
    del sent["config"]
    assert sent == expected


MANIFEST: dict[str, Any] = {
    "model": "some",
    "backend": "tinker",
    "trainer_type": "rl",
    "capability_ref": {"name": "helper", "version": "1"},
    "tags": ["a", "b"],
    "config": {"algorithm": "ppo", "steps": 5, "reward_recipe": {"name": "contains_v1", "params": {"needle": "x"}}},
}


@pytest.mark.parametrize("dump", [yaml.safe_dump, json.dumps])
def test_flags_take_the_place_of_a_manifests_fields(dump: Callable[[Any], str], tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(dump(MANIFEST))
    flags = ["--steps", "7", "--tag", "c", "--reward-params", '{"needle": "y"}', "--prompt-split", "train"]
    given = vars(make_jobs_parser().parse_args(["submit", str(path), *flags]))
    assert make_request(str(path), given) == {
        **MANIFEST,
        "tags": ["c"],
        "config": {
            "algorithm": "ppo",
            "steps": 7,
            "reward_recipe": {"name": "contains_v1", "params": {"needle": "y"}},
            "prompt_split": "train",
        },
    }


def test_a_recipe_by_flag_leaves_nothing_of_the_manifests(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(MANIFEST))
    given = vars(make_jobs_parser().parse_args(["submit", str(path), "--reward-recipe", "exact_match_v1"]))
    assert make_request(str(path), given)["config"]["reward_recipe"] == {"name": "exact_match_v1"}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command; what it prints, or with another status than 0, why."""
    monkeypatch.delenv("TINKER_PLUGINS", raising=False)

    def call(*arguments: str, status: int = 0) -> str:
        code = main(["jobs", *arguments])
        captured = capsys.readouterr()
        assert code == status, captured.err
        return captured.err if status else captured.out

    return call


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("submit",), "MANIFEST"),
        (("submit", "nothing.yaml"), "there is no manifest 'nothing.yaml'"),
        (("submit", "sft", "--steps", "many"), "argument --steps: must be a whole number, got 'many'"),
        (("submit", "sft", "--learning-rate", "nan"), "finite"),
        (("submit", "sft", "--dataset", "rows"), "must be NAME@VERSION, got 'rows'"),
        (("submit", "rl", "--reward-params", "[]"), "must be a JSON object"),
        (("submit", "rl", "--reward-params", "{}"), "--reward-params sets a part of reward_recipe"),
        (("submit", "sft", "--step", "3"), "unrecognized arguments: --step 3"),
        (("list", "--status", "over"), "invalid choice: 'over'"),
        (("cancel", "some-id", "--url", "http://127.0.0.1:1"), "say --yes"),
        (("list", "--url", "localhost:8000"), "begins with http://"),
        (("list", "--api-key", "ключ"), "characters that no key has; look at --api-key"),
        (("add-dataset", "rows", "none.jsonl"), "name@version"),
        (("add-dataset", "rows@1", "train=a", "train=b"), "split 'train' is given twice"),
        (("forget",), "invalid choice: 'forget'"),
    ],
)
def test_arguments_that_cannot_work_are_named(
    arguments: tuple[str, ...], said: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert said in run(*arguments, status=2)


def test_a_manifest_that_is_none_is_refused(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    bad = {"- a\n": "must be an object", "a: [\n": "cannot read the manifest", "1: a\n": "JSON has no form for"}
    for text, said in bad.items():
        path.write_text(text)
        assert said in run("submit", str(path), status=2)


def test_a_server_that_is_not_there_is_named_with_what_to_do(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("TINKER_BASE_URL", url)
    said = run("list", status=2)
    assert f"no server answers at {url}" in said
    assert "--url" in said


# --- a real server ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifest(job_server: JobServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A supervised job of two steps; what it refers to was added with the command."""
    root = tmp_path_factory.mktemp("cli")
    (root / "rows.jsonl").write_text('{"prompt": "hi", "answer": "ho"}\n' * 2)
    (root / "prompt.md").write_text("Be brief.\n")
    (root / "job.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "from-yaml",
                "model": job_server.model,
                "backend": "tinker",
                "trainer_type": "sft",
                "capability_ref": {"name": "cli-helper", "version": "1"},
                "config": {"dataset_ref": {"name": "cli-rows", "version": "1"}, "steps": 1, "batch_size": 2},
            }
        )
    )
    data = ("--data-dir", str(job_server.data_dir))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TINKER_PLUGINS", raising=False)
        patch.setenv("TINKER_BASE_URL", job_server.url)
        assert main(["jobs", "add-dataset", "cli-rows@1", str(root / "rows.jsonl"), *data]) == 0
        assert main(["jobs", "add-capability", "cli-helper@1", str(root / "prompt.md"), *data]) == 0
        yield root / "job.yaml"


@pytest.fixture(scope="module")
def followed(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The id of a job that was submitted and followed to its end, and what that printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", output := io.StringIO())
        flags = ("--steps", "2", "--learning-rate", "0.01", "--lora-rank", "4", "--follow")
        assert main(["jobs", "submit", str(manifest), *flags]) == 0
    return output.getvalue().splitlines()[-1].split()[0], output.getvalue()


def test_a_followed_job_prints_its_log_and_how_it_ended(followed: tuple[str, str], run: Run) -> None:
    job_id, text = followed
    *log, header, end = text.splitlines()
    assert any("step 2/2" in line for line in log)
    assert header.split()[:4] == ["ID", "STATUS", "KIND", "NAME"]
    assert end.split()[:4] == [job_id, "completed", "sft", "from-yaml"]
    assert run("logs", job_id).splitlines() == log
    assert run("logs", job_id, "--follow") == text


def test_a_job_is_listed_and_shown_with_what_was_sent(followed: tuple[str, str], run: Run) -> None:
    job_id, _ = followed
    wanted = ("--status", "completed", "--trainer-type", "sft", "--backend", "tinker", "--page-size", "100")
    listed = json.loads(run("list", *wanted, "--format", "json"))
    (job,) = [job for job in listed if job["id"] == job_id]
    assert job["config"] == {
        "dataset_ref": {"name": "cli-rows", "version": "1"},
        "steps": 2,
        "batch_size": 2,
        "learning_rate": 0.01,
        "lora_rank": 4,
    }
    shown = run("show", job_id)
    assert re.search(r"^config\.steps +2$", shown, re.MULTILINE)
    assert re.search(r"^metrics\.train/loss +\S+ \(last of 2\)$", shown, re.MULTILINE)
    assert job_id not in run("list", "--status", "cancelled", "--page-size", "100")


def test_the_plots_of_a_job_are_among_its_artifacts(followed: tuple[str, str], run: Run, tmp_path: Path) -> None:
    job_id, _ = followed
    artifacts = json.loads(run("artifacts", job_id, "--save-plots", str(tmp_path / "plots"), "--format", "json"))
    assert artifacts["plots"] == ["loss.svg", "loss.png"]
    assert (tmp_path / "plots/loss.svg").read_text().count("<svg ") == 1
    assert (tmp_path / "plots/loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_lost_connection_is_taken_up_after_the_last_line_that_was_seen(
    followed: tuple[str, str], run: Run, job_server: JobServer
) -> None:
    job_id, text = followed
    with cutting_relay(job_server.url) as relay:
        assert run("logs", job_id, "--follow", "--url", relay.url) == text
    first, second = relay.streams
    assert b"last-event-id" not in first.lower()
    assert re.search(rb"^last-event-id: \d+\r$", second.lower(), re.MULTILINE)


def test_a_server_that_is_about_to_start_is_asked_again(
    followed: tuple[str, str], job_server: JobServer, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    job_id, text = followed
    with cutting_relay(job_server.url, is_busy=True) as relay:
        assert main(["jobs", "logs", job_id, "--follow", "--url", relay.url]) == 0
    captured = capsys.readouterr()
    assert captured.out == text
    assert "connection lost (starting up); taking it up again" in captured.err
    assert len(relay.streams) == 2


def test_a_terminal_gets_a_bar_below_the_log(followed: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    job_id, text = followed
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 120))
    seen = bytearray()

    def read() -> None:
        while True:
            try:
                seen.extend(os.read(master, 4096))
            except OSError:
                return  # the other end is closed

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w") as terminal, monkeypatch.context() as patch:
        patch.delenv("TINKER_PLUGINS", raising=False)
        patch.setattr("sys.stdout", terminal)
        patch.setattr("sys.stderr", terminal)
        assert main(["jobs", "logs", job_id, "--follow"]) == 0
    reader.join(timeout=120)
    os.close(master)
    screen = seen.decode()
    assert re.search(r"2/2 .*loss=\d", screen)
    above = [line for line in text.splitlines() if "saved final" in line]
    assert len(above) == 1
    assert above[0] in screen
    assert "step 2/2" not in screen


def test_every_mistake_of_a_request_stands_on_a_line_with_its_path(run: Run, manifest: Path) -> None:
    said = run("submit", str(manifest), "--steps", "0", "--epochs", "0", status=2)
    assert re.search(r"^  config\.steps: Input should be greater than or equal to 1$", said, re.MULTILINE)
    assert re.search(r"^  config\.epochs: Input should be greater than or equal to 1$", said, re.MULTILINE)
    said = run("submit", str(manifest), "--dataset", "no-rows@1", status=2)
    assert re.search(r"^  config\.dataset_ref: dataset not found: no-rows@1", said, re.MULTILINE)


def test_what_a_server_refuses_is_said_in_its_words(followed: tuple[str, str], run: Run) -> None:
    job_id, _ = followed
    assert "Training job not found" in run("show", "no-such-job", status=2)
    assert "Organization not found" in run("list", "--organization", "other", status=2)
    assert "completed" in run("retry", job_id, status=2)
    assert "completed" in run("cancel", job_id, "--yes", status=2)


# --- a server on which jobs stay queued -------------------------------------------------------------------------------

GRPO = (
    *("submit", "grpo", "--model", "local/tiny", "--capability", "helper@1.0.0"),
    *("--task", "my-task", "--prompt-dataset", "gsm8k@1.0.0"),
)


def test_a_cancelled_job_ends_whoever_waits_with_1_and_may_be_retried(run: Run, jobs_api: JobsApi) -> None:
    url = ("--url", jobs_api.url)
    (job,) = json.loads(run(*GRPO, "--format", "json", *url))
    assert (job["backend"], job["status"], job["task_ref"]) == ("ray", "queued", "my-task@1.0.0")
    assert "cancelled" in run("cancel", job["id"], "--yes", *url)
    run("logs", job["id"], "--follow", *url, status=1)
    assert "queued" in run("retry", job["id"], *url)
    assert jobs_api.report(job["id"], "training_error", error="no more room").status_code == 200
    assert "the job failed: no more room" in run("logs", job["id"], "--follow", *url, status=1)


def test_a_list_says_how_many_jobs_it_leaves_out(
    jobs_api: JobsApi, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = [jobs_api.new(project_ref="cli-pages")["id"] for _ in range(3)]
    wanted = ("--project-ref", "cli-pages", "--page-size", "2", "--url", jobs_api.url)
    assert main(["jobs", "list", *wanted]) == 0
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()[1:]] == [mine[2], mine[1]]
    assert "2 of 3 jobs" in captured.err
    assert run("list", *wanted, "--page", "2").splitlines()[1].startswith(mine[0])


def test_whoever_has_no_key_learns_how_to_give_one(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    key, _ = make_key(tmp_path, owner="ann")
    with serve_jobs(tmp_path, key=key) as api:
        assert "--api-key or TINKER_API_KEY" in run("list", "--url", api.url, status=2)
        job = api.new(name="of-ann")
        assert job["id"] in run("list", "--url", api.url, "--api-key", key)
        monkeypatch.setenv("TINKER_API_KEY", key)
        assert "of-ann" in run("show", job["id"], "--url", api.url)


# --- the how-to -------------------------------------------------------------------------------------------------------

HOW_TO = (Path(__file__).parents[2] / "docs/how-to/run-jobs.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", HOW_TO, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line
    for language, text in BLOCKS
    if language == "bash"
    for line in text.replace("\\\n", " ").splitlines()
    if line.startswith("tinker-server jobs ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_how_to_are_legal(command: str) -> None:
    given = vars(make_jobs_parser().parse_args(shlex.split(command)[2:]))
    if given["action"] == "submit" and given["source"] in KINDS:
        parse(make_request(given["source"], given))


def test_the_manifest_of_the_how_to_is_a_job() -> None:
    (manifest,) = [text for language, text in BLOCKS if language == "yaml"]
    request = parse(yaml.safe_load(manifest))
    assert (request.backend, request.trainer_type) == ("tinker", "sft")


def test_the_recipe_of_the_how_to_is_a_plugin() -> None:
    (code,) = [text for _, text in BLOCKS if "tinker_register_reward_recipe" in text]
    module: dict[str, Any] = {}
    exec(code, module)
    found: list[RewardRecipePlugin] = []
    module["tinker_register_reward_recipe"](found.append)
    judged = Judged(completion="abc", row={}, params={"limit": 4})
    assert found[0].score(judged).value == 0.25


@pytest.mark.parametrize("recipe", [*(recipe.name for recipe in BUILT_IN), *ENVIRONMENT_RECIPES])
def test_every_recipe_is_in_the_how_tos_table(recipe: str) -> None:
    assert f"| `{recipe}` |" in HOW_TO
