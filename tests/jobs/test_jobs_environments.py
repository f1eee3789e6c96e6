"""Tasks done in environments of a plugin: folders of this machine, in which a policy's replies are shell commands."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from pathlib import Path
from typing import Any, Protocol

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.jobs.conftest import JobServer
from tests.jobs.folder_environments import OPENED, Folder
from tests.jobs.played import Script, ScriptedRun, ScriptedSampler, in_turn
from tests.jobs.workers import make_refs, make_spec, run_worker
from tests.models import write_tokenizer
from tinker_core.rewards import CommandResult, EnvironmentPlugin, RewardError
from tinker_jobs.environments.checking import check_environment_job, choose_provider, read_verification
from tinker_jobs.environments.names import AGENT, VERIFIER
from tinker_jobs.environments.place import judge
from tinker_jobs.environments.source import EnvironmentSource
from tinker_jobs.errors import JobFailedError
from tinker_jobs.protocol import EventType
from tinker_jobs.refs import FrozenDataset, FrozenFile, FrozenTask
from tinker_jobs.requests import TinkerRLJobConfig
from tinker_jobs.rl.rollouts import Rollout

PLUGINS = ("jobs", "tests.jobs.folder_environments")
FLAG = {"method": "env_flag", "flag_path": "flag.txt", "expected": "open"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, max_context=10_000)
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    return loaded


def freeze_rows(path: Path, rows: list[dict[str, Any]]) -> FrozenDataset:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(content)
    file = FrozenFile(path=str(path), size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    return FrozenDataset(name="rows", version="1", splits={"train": file}, default_split="train")


def freeze_task(**content: Any) -> FrozenTask:
    return FrozenTask(name="task", version="1", content={"instruction": "Write {{ word }} to flag.txt.", **content})


class Play:
    """Steps of a job with a scripted policy."""

    def __init__(self, run: ScriptedRun, script: Script) -> None:
        self.run = run
        self.sampler = ScriptedSampler(run.tokenizer, script)
        assert isinstance(run.request.config, TinkerRLJobConfig)
        self.source = EnvironmentSource.open(run, run.request.config)

    def step(self, step: int = 1) -> tuple[Rollout, ...]:
        return asyncio.run(self.source.collect(step, self.sampler.policy()))


class Start(Protocol):
    def __call__(self, recipe: str, script: Script, **config: Any) -> Play: ...


@pytest.fixture
def start(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Start:
    """Starts jobs of one attempt a step; ``rows``, ``verification`` and ``params`` are no fields of a request."""

    def start(recipe: str, script: Script, **config: Any) -> Play:
        rows = config.pop("rows", [{"prompt": "Go.", "context": {"word": "open"}, "inputs": {"word": "hello"}}])
        task = freeze_task(verification=config.pop("verification", FLAG))
        reward = {"name": recipe, "params": config.pop("params", {})}
        dataset = {"prompt_dataset_ref": {"name": "rows", "version": "1"}, "task_ref": "task@1"}
        config = {**dataset, "reward_recipe": reward, "num_rollouts": 1, "batch_size": 1, **config}
        prompts = freeze_rows(tmp_path / "rows.jsonl", rows)
        return Play(
            ScriptedRun(tokenizer, tmp_path, config, plugins=PLUGINS, task=task, prompt_dataset=prompts), script
        )

    return start


@pytest.fixture
def opened() -> list[Folder]:
    """The environments of a test."""
    OPENED.clear()
    return OPENED


# --- the two recipes --------------------------------------------------------------------------------------------------


def test_one_reply_is_verified_in_an_environment_of_its_own(start: Start, opened: list[Folder]) -> None:
    play = start(VERIFIER, in_turn("echo open > flag.txt", "echo shut > flag.txt"), num_rollouts=2)
    rollouts = sorted(play.step(), key=lambda rollout: -rollout.reward)
    assert [rollout.reward for rollout in rollouts] == [1.0, 0.0]
    assert [[turn.advantage for turn in rollout.turns] for rollout in rollouts] == [[0.5], [-0.5]]
    assert [rollout.metrics for rollout in rollouts] == [
        {"reward/passed": passed, "env/turns": 1.0, "env/error": 0.0} for passed in (1.0, 0.0)
    ]
    assert play.sampler.prompts[0] == "system: Write open to flag.txt.\nuser: Go.\nassistant: "
    assert [dict(one.inputs) for one in opened] == [{"word": "hello"}] * 2
    assert [one.seconds for one in opened] == [300.0] * 2
    assert [one.num_closed for one in opened] == [1, 1]
    assert all(len(one.threads) == 1 and threading.get_ident() not in one.threads for one in opened)
    assert not any(one.path.exists() for one in opened)


def test_an_agent_acts_until_the_environment_says_that_it_is_done_and_every_turn_has_the_one_reward(
    start: Start, opened: list[Folder]
) -> None:
    play = start(AGENT, in_turn("cat begin.txt", "cp begin.txt flag.txt", "exit 0"), params={"baseline": "none"})
    (rollout,) = play.step()
    assert rollout.reward == 0.0  # the flag is "hello"
    assert rollout.metrics["env/turns"] == 3
    assert play.sampler.prompts[1].endswith("assistant: cat begin.txt\nuser: hello\nassistant: ")
    assert play.sampler.prompts[2].endswith("assistant: cp begin.txt flag.txt\nuser: (no output)\nassistant: ")
    assert opened[0].seconds == 600.0

    play = start(
        AGENT,
        in_turn("ls", "echo open > flag.txt"),
        params={"baseline": "none", "reward_if_true": 3, "reward_if_false": -1, "max_turns": 2, "env_timeout_sec": 50},
    )
    (rollout,) = play.step()
    assert rollout.reward == 3.0
    assert [turn.advantage for turn in rollout.turns] == [3.0, 3.0]
    assert opened[1].seconds == 50.0


@pytest.mark.parametrize(
    ("config", "turns"),
    [
        ({}, 20),
        ({"max_turns": 4}, 4),
        ({"max_turns": 4, "max_episode_steps": 3}, 3),
        ({"max_turns": 4, "params": {"max_turns": 2}}, 2),
    ],
)
def test_an_agent_has_as_many_turns_as_the_request_gives(start: Start, config: dict[str, Any], turns: int) -> None:
    (rollout,) = start(AGENT, in_turn("true"), **config).step()
    assert rollout.metrics["env/turns"] == turns


def test_attempts_at_one_row_are_compared_with_each_other_and_rows_are_taken_in_turn(start: Start) -> None:
    rows = [{"prompt": f"Row {number}.", "context": {"word": "x"}} for number in range(3)]

    def script(prompt: str) -> str:
        return "echo open > flag.txt" if "Row 0" in prompt or next(others) else "true"

    others = iter([True, False])
    play = start(VERIFIER, script, rows=rows, num_rollouts=4, batch_size=2)
    found = [(rollout.reward, rollout.turns[0].advantage) for rollout in play.step()]
    assert found[:2] == [(1.0, 0.0), (1.0, 0.0)]
    assert sorted(found[2:]) == [(0.0, -0.5), (1.0, 0.5)]
    assert play.source.steps_per_pass == 2
    others = iter([False, False])
    play.step(2)
    asked = [next(row for row in range(3) if f"Row {row}" in prompt) for prompt in play.sampler.prompts]
    assert sorted(asked) == [0, 0, 0, 0, 1, 1, 2, 2]


def test_no_more_environments_are_open_at_once_than_the_request_allows(start: Start, opened: list[Folder]) -> None:
    most = 0

    def script(_: str) -> str:
        nonlocal most
        most = max(most, sum(not one.num_closed for one in opened))
        return "true"

    start(VERIFIER, script, num_rollouts=5, params={"max_concurrent_rollouts": 2}).step()
    assert len(opened) == 5
    assert most == 2


# --- environments that fail -------------------------------------------------------------------------------------------


def test_an_attempt_whose_environment_fails_is_told_of_and_not_learned_from(start: Start, opened: list[Folder]) -> None:
    play = start(VERIFIER, in_turn("crash", "echo open > flag.txt", "true"), num_rollouts=3)
    rollouts = play.step()
    assert sorted(rollout.metrics["env/error"] for rollout in rollouts) == [0.0, 0.0, 1.0]
    assert sorted(len(rollout.turns) for rollout in rollouts) == [0, 1, 1]
    assert sorted(turn.advantage for rollout in rollouts for turn in rollout.turns) == [-0.5, 0.5]
    (warning,) = [event for event in play.run.events if event.level == "warning"]
    assert warning.message == "1 of 3 environments of step 1 failed: folder: ConnectionError: container is gone"
    assert all(one.num_closed == 1 for one in opened)


def test_a_job_ends_when_every_environment_fails(start: Start) -> None:
    rows = [{"prompt": "Go.", "inputs": {"broken": True}}]
    with pytest.raises(JobFailedError, match="all 2 environments of step 3 failed: folder: OSError: no space left"):
        start(VERIFIER, in_turn("true"), rows=rows, num_rollouts=2).step(3)


@pytest.mark.slow
def test_an_attempt_that_outlives_its_environment_has_not_passed(start: Start, opened: list[Folder]) -> None:
    play = start(VERIFIER, in_turn("sleep 21"), params={"env_timeout_sec": 20})
    (rollout,) = play.step()
    assert (rollout.reward, rollout.metrics["env/error"], len(rollout.turns)) == (0.0, 0.0, 1)
    assert opened[0].num_closed == 1


@pytest.mark.slow
def test_a_verdict_stands_however_long_the_environment_takes_to_close(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged, close = threading.Event(), Folder.close

    def close_late(folder: Folder) -> None:
        judged.wait(60)
        close(folder)

    monkeypatch.setattr(Folder, "close", close_late)
    play = start(VERIFIER, in_turn("echo open > flag.txt"), params={"env_timeout_sec": 10})
    (rollout,) = play.step()
    judged.set()
    assert (rollout.reward, rollout.metrics["reward/passed"], rollout.metrics["env/error"]) == (1.0, 1.0, 0.0)


# --- verification -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verification", "replies", "passed"),
    [
        ({"method": "env_script", "script_path": "./check.sh"}, "echo hi", True),
        ({"method": "env_script", "script_path": "./check.sh"}, "true # no trace", False),
        ({"method": "env_script", "script_path": "./check.sh", "expected_exit_code": 1}, "true # no trace", True),
        ({**FLAG, "expected": "shut"}, "echo open > flag.txt", False),
        (
            {"method": "env_flag", "flag_path": "flag.txt", "hash": f"sha256:{hashlib.sha256(b'open').hexdigest()}"},
            "printf ' open \\n' > flag.txt",
            True,
        ),
        ({**FLAG, "flag_path": "other.txt"}, "echo open > flag.txt", False),
        ({**FLAG, "timeout_sec": 0.2}, "mkfifo flag.txt", False),  # which nobody ever writes to
    ],
)
def test_an_environment_is_verified_as_the_task_says(
    start: Start, verification: dict[str, Any], replies: str, passed: bool
) -> None:
    (rollout,) = start(VERIFIER, in_turn(replies), verification=verification).step()
    assert rollout.reward == float(passed)


def test_a_flag_lies_where_tasks_put_it_by_default() -> None:
    verification = read_verification({"verification": {"method": "env_flag", "expected": "x"}})
    assert verification.command == ("cat", "/tmp/flag")
    assert judge(CommandResult(exit_code=0, output=" x\n"), verification)


PROVIDERS = {name: EnvironmentPlugin(name=name, open=lambda *_: None) for name in ("docker", "local")}  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("recipe", "params", "task", "words"),
    [
        (VERIFIER, {}, {}, "environment.provider, one of docker, local"),
        (VERIFIER, {}, {"environment": {"provider": "podman"}}, "'podman' is none of this server's: docker, local"),
        (VERIFIER, {"max_turns": 3}, {}, "unknown params max_turns"),
        (AGENT, {"max_turns": 0}, {}, "max_turns must be greater than 0"),
        (AGENT, {"env_timeout_sec": "long"}, {}, "env_timeout_sec must be a number"),
        (AGENT, {"max_concurrent_rollouts": 1.5}, {}, "max_concurrent_rollouts must be an integer"),
        (AGENT, {}, {"environment": {"provider": "local"}}, "method env_flag or env_script, got None"),
        (
            AGENT,
            {},
            {"environment": {"provider": "local"}, "verification": {"method": "llm_judge"}},
            "method env_flag or env_script, got 'llm_judge'",
        ),
        (
            AGENT,
            {},
            {"environment": {"provider": "local"}, "verification": {"method": "env_flag"}},
            "needs hash (sha256:…) or expected",
        ),
        (
            AGENT,
            {},
            {"environment": {"provider": "local"}, "verification": {"method": "env_script"}},
            "needs script_path",
        ),
    ],
)
def test_a_job_that_no_environment_could_judge_is_refused(
    recipe: str, params: dict[str, Any], task: dict[str, Any], words: str
) -> None:
    with pytest.raises(RewardError) as refused:
        check_environment_job(recipe, params, task, PROVIDERS)
    assert words in str(refused.value)


def test_a_task_names_its_provider_or_there_is_only_one() -> None:
    check_environment_job(AGENT, {}, {"environment": {"provider": "local"}, "verification": FLAG}, PROVIDERS)
    assert choose_provider({"environment": {"provider": "docker"}}, PROVIDERS) is PROVIDERS["docker"]
    assert choose_provider({}, {"local": PROVIDERS["local"]}) is PROVIDERS["local"]
    with pytest.raises(RewardError, match="no provider of environments"):
        choose_provider({}, {})


# --- real jobs --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [VERIFIER, AGENT])
def test_a_job_trains_in_environments(job_server: JobServer, tmp_path: Path, recipe: str) -> None:
    """The tiny model's replies are no commands: it passes by having said anything at all."""
    task = freeze_task(
        instruction="Go.",
        environment={"provider": "folder"},
        verification={"method": "env_script", "script_path": "./check.sh"},
    )
    rows = freeze_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    config = {
        "algorithm": "ppo",
        "task_ref": "task@1",
        "prompt_dataset_ref": {"name": "rows", "version": "1"},
        "reward_recipe": {"name": recipe, "params": {"baseline": "none"}},
        "steps": 2,
        "num_rollouts": 4,
        "max_turns": 2,
        "max_new_tokens": 4,
    }
    request = {"backend": "tinker", "trainer_type": "rl", "config": config}
    refs = make_refs(task=task, prompt_dataset=rows)
    spec = make_spec(job_server.url, job_server.model, tmp_path / "job", request, refs=refs, plugins=PLUGINS)
    end = run_worker(spec)[-1]
    assert end.event_type is EventType.TRAINING_END, (end.message, (tmp_path / "job" / "worker.log").read_text())
    assert end.metrics["env/turns"] == [1.0 if recipe == VERIFIER else 2.0] * 2
    assert end.metrics["env/error"] == [0.0, 0.0]
    assert end.artifacts["task"] == "task@1"
