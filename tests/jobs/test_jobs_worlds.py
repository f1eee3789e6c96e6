"""Episodes in live worlds: what a policy can do there, how they end, and what is learned from them."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import pytest
import tinker
from starlette.responses import JSONResponse, Response
from tinker import types
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.jobs.conftest import JobServer
from tests.jobs.played import (
    Script,
    ScriptedRun,
    ScriptedSampler,
    TestWorld,
    commands_of,
    freeze_world,
    in_turn,
    serve_world,
)
from tests.jobs.workers import make_refs, make_spec, run_worker
from tests.models import EOS_ID, write_tokenizer
from tests.serving import serve_in_thread
from tinker_jobs.errors import JobFailedError
from tinker_jobs.protocol import EventType, JobSpec
from tinker_jobs.refs import FrozenTask, FrozenWorld
from tinker_jobs.requests import TinkerRLJobConfig
from tinker_jobs.rl.rollouts import Rollout
from tinker_jobs.worlds import runtime
from tinker_jobs.worlds.source import WorldSource

ROOT = Path(__file__).parents[2]
TOKEN = "s3cret-token"
WITH_TOOLS = (
    "{% if tools %}{{ 'tools <tool_call>: ' + (tools | tojson) + '\n' }}{% endif %}"
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
NOTHING = {"stdout": "", "stderr": "", "exit_code": 0}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """All of a model that scripted policies need."""
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, max_context=10_000)
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    return loaded


@pytest.fixture(scope="module")
def served() -> Iterator[TestWorld]:
    with serve_world() as world:
        yield world


@pytest.fixture
def world(served: TestWorld) -> TestWorld:
    """A world that answers nothing to anything, until a test says otherwise."""
    served.begin(lambda _: NOTHING)
    return served


def load_reference_world() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_world", ROOT / "examples" / "world" / "world.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REFERENCE = load_reference_world()


@pytest.fixture(scope="module")
def reference_url() -> Iterator[str]:
    with serve_in_thread(REFERENCE.make_app(7, TOKEN)) as url:
        yield url


class Play:
    """Steps of a job with a scripted policy, in a world."""

    def __init__(self, run: ScriptedRun, script: Script) -> None:
        self.run = run
        self.sampler = ScriptedSampler(run.tokenizer, script)
        self.source = self.open()

    def open(self) -> WorldSource:
        assert isinstance(self.run.request.config, TinkerRLJobConfig)
        return WorldSource.open(self.run, self.run.request.config)

    def step(self, step: int = 1) -> tuple[Rollout, ...]:
        return asyncio.run(self.source.collect(step, self.sampler.policy()))


class Start(Protocol):
    def __call__(self, world: TestWorld | FrozenWorld, script: Script, **config: Any) -> Play: ...


@pytest.fixture
def start(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Start:
    """Starts jobs of one episode a step; ``max_context`` and ``task`` are no fields of a request."""

    def start(world: TestWorld | FrozenWorld, script: Script, **config: Any) -> Play:
        frozen = world if isinstance(world, FrozenWorld) else freeze_world(tmp_path, world.url)
        context, task = config.pop("max_context", 10_000), config.pop("task", None)
        config = {"world_manifest_id": "corp", "num_rollouts": 1, **config}
        return Play(ScriptedRun(tokenizer, tmp_path, config, max_context=context, world=frozen, task=task), script)

    return start


def state_of(rollout: Rollout) -> str:
    (state,) = [name for name in ("finished", "stalled", "max_steps", "error") if rollout.metrics[f"world/{name}"]]
    return state


def solve(prompt: str) -> str:
    """Finds the way to the reference world's goal in what its commands have answered."""
    told = prompt.rsplit("user: ", 1)[1]
    if "Goal" in told:
        return "I look around.\nrun: scan"
    if hosts := re.findall(r"(\w+)\.corp\.local", told):
        return "\n".join(f"run: read {host} notes.txt" for host in hosts)
    if found := re.search(r"password of (\w+) is (\S+)", told):
        return f"run: login {found[1]} {found[2]}\nrun: whoami"
    if found := re.search(r"ForceChangePassword on (\w+)", told):
        return f"run: reset {found[1]}"
    return "give up: lost"


# --- the reference world ----------------------------------------------------------------------------------------------


def test_a_policy_that_follows_the_traces_reaches_the_goal_of_the_reference_world(
    start: Start, tmp_path: Path, reference_url: str
) -> None:
    world = freeze_world(tmp_path, reference_url, auth_token=TOKEN, goal="rule the network")
    config = {"num_rollouts": 2, "world_reward": {"name": "heuristic_v1", "params": {"baseline": "none"}}}
    play = start(world, solve, **config)
    first, second = play.step()
    assert state_of(first) == state_of(second) == "finished"
    assert first.metrics["world/turns"] == 7  # scan, read, then login and reset twice each, and login
    assert first.reward == pytest.approx(second.reward)
    earned = {name.removeprefix("world/reward/"): value for name, value in first.metrics.items() if "reward" in name}
    assert earned["host_discovery"] == pytest.approx(0.1)
    assert earned["credential_discovery"] == pytest.approx(3 * 0.2)  # the note, and two resets
    assert earned["privilege_escalation"] == pytest.approx(2 * 0.35)  # whoami, twice
    assert earned["tool_stop"] == pytest.approx(0.15)
    assert earned["tool_error_penalty"] == 0
    assert first.reward == pytest.approx(sum(earned.values()) + 1.0)
    # Without a baseline an advantage is what is still to come, the end included.
    sums = [turn.advantage for turn in first.turns]
    assert sums[0] == pytest.approx(first.reward)
    assert sums == sorted(sums, reverse=True)
    assert sums[-1] == pytest.approx(1.0 + 0.15 + 0.02)
    assert "user: Goal: rule the network\n" in play.sampler.prompts[0]
    assert "- login USER PASSWORD: act as another user" in play.sampler.prompts[0]
    assert "run: COMMAND" in play.sampler.prompts[0]


def test_the_reference_world_is_the_same_for_equal_seeds_and_another_for_others() -> None:
    networks = [REFERENCE.Network.of_seed(seed) for seed in (7, 7, 8)]
    assert networks[0] == networks[1] != networks[2]


def test_the_manifest_of_the_reference_world_is_one_that_the_library_takes() -> None:
    from tinker_jobs.library.worlds import read_world

    world = read_world(ROOT / "examples" / "world" / "corp.yaml")
    assert (world.server_url, world.goal) == ("http://127.0.0.1:9000", "become a member of Domain Admins")


# --- tokens and advantages --------------------------------------------------------------------------------------------


def test_what_is_trained_on_is_exactly_what_was_sampled(
    start: Start, world: TestWorld, tokenizer: PreTrainedTokenizerBase
) -> None:
    world.begin(lambda _: {**NOTHING, "stdout": "a house"})
    play = start(world, in_turn("run: look  \n\n", "finish: seen"), temperature=0.5, max_new_tokens=9)
    (rollout,) = play.step()
    assert state_of(rollout) == "finished"
    for turn, prompt, reply in zip(rollout.turns, play.sampler.prompts, play.sampler.replies, strict=True):
        assert tokenizer.decode(turn.prompt) == prompt
        assert list(turn.completion) == list(reply.tokens)
        assert turn.completion[-1] == EOS_ID  # which is learned too, though no later prompt shows it
        assert list(turn.logprobs) == reply.logprobs
    assert play.sampler.prompts[1].endswith("assistant: run: look  \n\n\nuser: a house\nassistant: ")
    assert {(params.temperature, params.max_tokens) for params in play.sampler.params} == {(0.5, 9)}


def test_turns_are_compared_with_those_of_the_other_episodes_of_the_step(start: Start, world: TestWorld) -> None:
    world.begin(lambda body: {**NOTHING, "goal_reached": body["command"] == "win"}, reports_goal=True)
    begun = in_turn("run: wait", "give up: no", "run: wait")
    gone_on = in_turn("run: win", "give up: no")

    def script(prompt: str) -> str:
        return begun(prompt) if prompt.count("assistant: ") == 1 else gone_on(prompt)

    reward = {"name": "goal_only_v1", "params": {"stall_penalty": -0.5}}
    rollouts = start(world, script, num_rollouts=3, world_reward=reward).step()
    found = {(len(one.turns), one.reward): [turn.advantage for turn in one.turns] for one in rollouts}
    # The mean reward-to-go of the first turns is (1 - 0.5 - 0.5) / 3, of the second (1 + 0 - 0.5) / 3.
    assert found == {
        (2, 1.0): pytest.approx([1.0, 1.0 - 0.5 / 3]),
        (1, -0.5): pytest.approx([-0.5]),
        (2, -0.5): pytest.approx([-0.5, -0.5 - 0.5 / 3]),
    }


def test_a_single_episode_is_compared_with_nothing(start: Start, world: TestWorld) -> None:
    (rollout,) = start(world, in_turn("run: a", "give up: b"), world_reward={"name": "goal_only_v1"}).step()
    assert [turn.advantage for turn in rollout.turns] == pytest.approx([-0.25, -0.25])


@pytest.mark.parametrize(
    ("config", "num_episodes"),
    [
        ({"num_rollouts": None}, 8),
        ({"num_rollouts": 3}, 3),
        ({"num_rollouts": 3, "batch_size": 2}, 2),
        ({"num_rollouts": None, "batch_size": 9}, 9),
    ],
)
def test_as_many_episodes_are_played_as_the_request_says(
    start: Start, world: TestWorld, config: dict[str, Any], num_episodes: int
) -> None:
    assert len(start(world, in_turn("give up: no"), **config).step()) == num_episodes


# --- how episodes end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replies", "config", "about", "state", "commands"),
    [
        (["finish: done"], {}, {}, "finished", []),
        (["finish: done"], {}, {"reports_goal": True}, "stalled", []),
        (["run: win"], {}, {"reports_goal": True}, "finished", ["win"]),
        (["run: lose"], {}, {"reports_goal": True}, "stalled", ["lose"]),
        (["run: stop"], {}, {}, "finished", ["stop"]),
        (["run: stop"], {}, {"reports_goal": True}, "stalled", ["stop"]),
        (["give up: no"], {}, {}, "stalled", []),
        (["let me think about it"], {}, {}, "stalled", []),
        (["run: a", "just talk"], {}, {}, "stalled", ["a"]),
        (["run: a"], {"max_turns": 3}, {}, "max_steps", ["a"] * 3),
        (["run: a"], {}, {}, "max_steps", ["a"] * 8),
        (["run: a\nrun: b"], {"max_episode_steps": 3}, {}, "max_steps", ["a", "b", "a"]),
        (["run: a", "run: win"], {"max_turns": 2}, {"reports_goal": True}, "finished", ["a", "win"]),
        (["run: win\nrun: more"], {}, {"reports_goal": True}, "finished", ["win"]),
        (["run: a"], {"max_context": 570, "max_new_tokens": 30}, {}, "max_steps", ["a"] * 3),
        (["<think>run: win\nso</think>give up: no"], {}, {}, "stalled", []),
        (["run: win"], {}, {"reply_is_command": True}, "max_steps", ["run: win"] * 8),
        (["win"], {}, {"reply_is_command": True}, "finished", ["win"]),
        (["  \n"], {}, {"reply_is_command": True}, "stalled", []),
    ],
)
def test_an_episode_ends(
    start: Start,
    world: TestWorld,
    replies: list[str],
    config: dict[str, Any],
    about: dict[str, Any],
    state: str,
    commands: list[str],
) -> None:
    answers = {"win": {"goal_reached": True}, "lose": {"goal_reached": False, "stop": True}, "stop": {"stop": True}}
    world.begin(lambda body: {**NOTHING, **answers.get(body["command"], {})}, **about)
    (rollout,) = start(world, in_turn(*replies), **config).step()
    assert (state_of(rollout), commands_of(world.bodies)) == (state, commands)
    assert len(rollout.turns) == rollout.metrics["world/turns"]
    assert rollout.metrics["world/commands"] == len(commands)


def test_a_first_prompt_that_leaves_no_room_fails_the_job_and_says_by_how_much(start: Start, world: TestWorld) -> None:
    play = start(world, in_turn("run: a"), max_context=100)
    with pytest.raises(JobFailedError, match=r"first prompt has \d+ tokens.*max_new_tokens=128.*context of 100"):
        play.step()


# --- what the world is told, and what the policy is -------------------------------------------------------------------


def test_what_a_command_changes_about_the_actor_goes_with_later_ones_of_the_same_episode_only(
    start: Start, world: TestWorld
) -> None:
    def answer(body: Mapping[str, Any]) -> Mapping[str, Any]:
        number = len(body["known_creds"]) + 1
        changes = {
            "principal_id": f"user-{number}",
            "host_id": "web01",
            "domain": "corp",
            "acquired_cred": f"cred-{number}",
            "compromised_host": "web01",
        }
        return {**NOTHING, "context_updates": changes, "stop": number == 3}

    world.begin(answer)
    start(world, in_turn("run: a"), num_rollouts=2).step()
    by_episode: dict[str, list[dict[str, Any]]] = {}
    for body, headers in zip(world.bodies, world.headers[1:], strict=True):
        by_episode.setdefault(headers["x-episode-id"], []).append(body)
    nobody = {"principal_id": None, "host_id": None, "domain": None, "known_creds": [], "compromised_hosts": []}
    for bodies in by_episode.values():
        assert bodies[0] == {"command": "a", **nobody}
        assert bodies[2] == {
            "command": "a",
            "principal_id": "user-2",
            "host_id": "web01",
            "domain": "corp",
            "known_creds": ["cred-1", "cred-2"],
            "compromised_hosts": ["web01"],
        }
    assert len(by_episode) == 2


def test_the_policy_is_told_who_it_is_what_it_can_do_and_what_came_of_it(
    start: Start, world: TestWorld, tmp_path: Path
) -> None:
    answers = {
        "both": {"stdout": "out\n", "stderr": "err\n", "exit_code": 3},
        "none": NOTHING,
        "long": {"stdout": "x" * 5000},
        "bad": JSONResponse({"detail": "no such command: bad"}, status_code=422),
    }
    about = {"description": "A cellar.", "commands": ["both", {"name": "none", "description": "says nothing"}]}
    world.begin(lambda body: answers[body["command"]], **about)
    task = FrozenTask(name="t", version="1", content={"instruction": "Be quick."})
    script = in_turn("run: both", "run: none\nRUN : bad", "run: long", "run:", "give up: x")
    frozen = freeze_world(tmp_path, world.url, agent_prompt="You are Ada.")
    play = start(frozen, script, task=task)
    (rollout,) = play.step()
    system = play.sampler.prompts[0]
    assert system.startswith("system: You are Ada.\n\nBe quick.\n\nA cellar.\n\n")
    assert "Commands:\n- both\n- none: says nothing\nuser: Goal: Domain Admins\nassistant: " in system
    told = [prompt.rsplit("user: ", 1)[1].removesuffix("\nassistant: ") for prompt in play.sampler.prompts[1:]]
    assert told == [
        "out\nerr\n(exit code 3)",
        "(no output)\n\nno such command: bad",
        "x" * 4000 + "\n(1000 more characters)",
        "run: needs a command after it",
    ]
    assert rollout.metrics["world/failed_calls"] == 2
    assert rollout.metrics["world/reward/tool_error_penalty"] == pytest.approx(-0.4)


def test_a_template_with_tools_is_used_with_its_own_calls(
    start: Start, world: TestWorld, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", WITH_TOOLS)
    world.begin(lambda body: {**NOTHING, "stdout": f"did {body['command']}"})

    def call(name: str, **arguments: Any) -> str:
        return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"

    script = in_turn(
        f"<think>{call('run_command', command='thought')}</think>{call('run_command', command='a')}"
        f"{call('run_command', command='b')}",
        "<tool_call>{oops</tool_call>",
        call("shell", command="a"),
        call("run_command", line="a"),
        call("finish_task", success="yes"),
        call("finish_task", success=True, summary="done"),
    )
    play = start(world, script)
    (rollout,) = play.step()
    assert state_of(rollout) == "finished"
    assert commands_of(world.bodies) == ["a", "b"]
    assert '"run_command"' in play.sampler.prompts[0]
    assert "run: COMMAND" not in play.sampler.prompts[0]
    last = play.sampler.prompts[-1]
    assert "</tool_call>\ntool: did a\ntool: did b\nassistant: " in last
    assert "tool: a tool call must be JSON" in last
    assert "tool: there is no tool 'shell'; there are run_command and finish_task\n" in last
    assert "tool: run_command needs command as text\n" in last
    assert "tool: finish_task needs success as true or false\n" in last
    assert rollout.metrics["world/failed_calls"] == 4
    assert rollout.metrics["world/reward/reasoning_trace"] == pytest.approx(0.01)


# --- worlds that fail -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("params", "advantages"), [({}, [1.0, 1.0]), ({"learn_from_errors": True}, [-1.0, 1.0, 1.0])])
def test_an_episode_that_the_world_fails_is_told_of_and_not_learned_from_unless_asked(
    start: Start, world: TestWorld, params: dict[str, Any], advantages: list[float]
) -> None:
    failure = JSONResponse({"detail": "out of disk"}, status_code=500)
    world.begin(lambda body: failure if body["command"] == "break" else {**NOTHING, "stop": True})
    reward = {"name": "goal_only_v1", "params": {"baseline": "none", **params}}
    play = start(world, in_turn("run: break", "run: a"), num_rollouts=3, world_reward=reward)
    rollouts = play.step()
    assert sorted(map(state_of, rollouts)) == ["error", "finished", "finished"]
    assert sorted(one.reward for one in rollouts) == [-1.0, 1.0, 1.0]
    assert sorted(turn.advantage for one in rollouts for turn in one.turns) == advantages
    (warning,) = play.run.events
    assert warning.level == "warning"
    assert "failed 1 of 3 episodes of step 1" in warning.message
    assert f"{world.url}/run answered 500: out of disk" in warning.message


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Response("busy", status_code=503), "answered 503: busy"),
        (JSONResponse({"detail": "who?"}, status_code=401), "answered 401: who?"),
        (Response("<html>"), "not JSON: '<html>'"),
        (JSONResponse(["out"]), "no JSON object"),
        (JSONResponse({"stdout": 3}), "stdout that is no text"),
        (JSONResponse({"exit_code": "0"}), "exit_code that is no integer"),
        (JSONResponse({"stop": 1}), "stop that is neither true nor false"),
        (JSONResponse({"context_updates": []}), "context_updates that are no object"),
    ],
)
def test_a_job_whose_every_episode_fails_ends_with_what_the_world_did(
    start: Start, world: TestWorld, answer: Response, words: str
) -> None:
    world.begin(lambda _: answer)
    with pytest.raises(JobFailedError) as failed:
        start(world, in_turn("run: a"), num_rollouts=2).step(4)
    assert f"the world failed all 2 episodes of step 4: POST {world.url}/run answered" in str(failed.value)
    assert words in str(failed.value)


def test_a_world_that_cannot_be_reached_fails_the_job_and_is_named(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "CONNECT_RETRIES", 0)  # which wait longer each time
    with serve_world() as world:
        play = start(world, in_turn("run: a"))
    with pytest.raises(JobFailedError, match=rf"all 1 episodes of step 1: POST {world.url}/run: ConnectError"):
        play.step()
    with pytest.raises(JobFailedError, match=rf"world corp at {world.url} does not answer: ConnectError"):
        play.open()


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"commands": None}, "without a list of commands"),
        ({"commands": [3]}, "neither text nor an object with a name: 3"),
        ({"reports_goal": "yes"}, "reports_goal that is neither true nor false"),
    ],
)
def test_a_world_that_says_something_else_than_its_commands_fails_the_job_at_its_start(
    start: Start, world: TestWorld, about: dict[str, Any], words: str
) -> None:
    world.begin(lambda _: NOTHING, **about)
    with pytest.raises(JobFailedError, match=rf"world corp: GET {world.url}/commands answered .*{words}"):
        start(world, in_turn("run: a"))


def test_the_token_is_sent_to_the_world_that_it_is_for_and_nowhere_else(
    start: Start, world: TestWorld, tmp_path: Path, reference_url: str
) -> None:
    frozen = freeze_world(tmp_path, world.url, auth_token=TOKEN)
    play = start(frozen, in_turn("run: a", "give up: b"))
    play.step()
    assert [headers["authorization"] for headers in world.headers] == [f"Bearer {TOKEN}"] * 2
    assert TOKEN not in repr(play.source._rules)
    Path(frozen.path).write_text("server_url: http://127.0.0.1:1\nauth_token: other\n")
    with pytest.raises(JobFailedError, match=r"world corp is at http://127.0.0.1:1 now, and was at"):
        play.open()
    Path(frozen.path).unlink()
    with pytest.raises(JobFailedError, match="the file of world corp cannot be used any more"):
        play.open()
    assert len(world.headers) == 2
    for token in (None, "wrong"):
        with pytest.raises(JobFailedError, match=r"answered 401; check auth_token in .*corp\.yaml"):
            start(freeze_world(tmp_path, reference_url, auth_token=token), in_turn("run: a"))


def test_a_field_that_no_world_has_use_for_is_refused(start: Start, world: TestWorld) -> None:
    with pytest.raises(JobFailedError, match="reward_recipe has no use in a live world"):
        start(world, in_turn("run: a"), reward_recipe={"name": "row_reward_v1"})


# --- real jobs --------------------------------------------------------------------------------------------------------


def world_job(job_server: JobServer, directory: Path, world: FrozenWorld, **config: Any) -> JobSpec:
    config = {"algorithm": "importance_sampling", "world_manifest_id": "corp", "max_new_tokens": 8, **config}
    request = {"backend": "tinker", "trainer_type": "rl", "config": config}
    refs = make_refs(world=world)
    return make_spec(job_server.url, job_server.model, directory, request, refs=refs)


@pytest.mark.slow
def test_a_job_trains_in_a_world_and_names_it(job_server: JobServer, world: TestWorld, tmp_path: Path) -> None:
    """The tiny model says anything at all, and this world takes that for a command."""
    numbers = itertools.count()
    world.begin(lambda _: {**NOTHING, "stdout": "a password" if next(numbers) % 3 == 0 else ""}, reply_is_command=True)
    frozen = freeze_world(tmp_path, world.url, auth_token=TOKEN, agent_prompt="Go.", goal="G")
    spec = world_job(job_server, tmp_path / "job", frozen, steps=2, num_rollouts=4, max_turns=2, learning_rate=0.1)
    events = run_worker(spec)
    log = (tmp_path / "job" / "worker.log").read_text()
    saved, end = events[-2:]
    assert end.event_type is EventType.TRAINING_END, log
    assert end.artifacts["world_manifest_id"] == "corp"
    assert end.artifacts["world_server_url"] == world.url
    assert end.metrics["steps"] == [1, 2]
    assert sum(end.metrics["world/commands"]) * 4 == len(world.bodies) > 4
    assert all(turns <= 2 for turns in end.metrics["world/turns"])
    service = tinker.ServiceClient(base_url=job_server.url, api_key=spec.api_key)
    before = service.create_sampling_client(base_model=job_server.model).result()
    after = service.create_sampling_client(model_path=saved.artifacts["checkpoints"][-1]).result()
    prompt = types.ModelInput.from_ints([5, 6, 7])
    assert before.compute_logprobs(prompt).result() != after.compute_logprobs(prompt).result()
    assert not any(TOKEN in str(event) for event in events)
    assert TOKEN not in log


@pytest.mark.slow
def test_a_policy_learns_what_a_world_rewards(job_server: JobServer, world: TestWorld, tmp_path: Path) -> None:
    """A reply with a comma finds a password; at first the tiny model seldom writes one."""
    world.begin(
        lambda body: {**NOTHING, "stdout": "a password" if "," in body["command"] else ""}, reply_is_command=True
    )
    reward = {"name": "mine", "params": {"components": [{"name": "credential_discovery", "params": {"value": 1}}]}}
    frozen = freeze_world(tmp_path, world.url, agent_prompt="Go.", goal="G")
    config = {"steps": 30, "num_rollouts": 16, "max_turns": 2, "learning_rate": 0.01, "world_reward": reward}
    rewards = run_worker(world_job(job_server, tmp_path / "job", frozen, **config))[-1].metrics["train/reward"]
    assert sum(rewards[:3]) / 3 < 1.0 < 1.6 < sum(rewards[-3:]) / 3, rewards
