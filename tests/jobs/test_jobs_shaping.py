"""What turns and ends of episodes are worth under each reward policy."""

from __future__ import annotations

from typing import Any

import pytest

from tinker_core.rewards import RewardError
from tinker_jobs.requests import TinkerRLJobConfig, WorldRewardPolicy
from tinker_jobs.worlds.checking import world_mistakes
from tinker_jobs.worlds.shaping import (
    COMPONENTS,
    PRESETS,
    Baseline,
    EpisodeState,
    RewardPolicy,
    ToolResult,
    TurnRecord,
    build_reward_policy,
    check_world_reward,
)


def policy(name: str = "heuristic_v1", **params: Any) -> RewardPolicy:
    return build_reward_policy(WorldRewardPolicy(name=name, params=params))


def only(component: str, **params: Any) -> RewardPolicy:
    return policy("mine", components=[{"name": component, "params": params}])


def found(text: str) -> TurnRecord:
    return TurnRecord(results=(ToolResult(text=text, found=text),))


def ends(rewards: RewardPolicy) -> list[float]:
    return [rewards.of_end(state) for state in EpisodeState]


@pytest.mark.parametrize(
    ("component", "value", "text"),
    [
        ("host_discovery", 0.10, "open port on 10.1.22.3"),
        ("host_discovery", 0.10, "172.16.0.9 is up"),
        ("host_discovery", 0.10, "172.31.255.9 is up"),
        ("host_discovery", 0.10, "gateway 192.168.1.1"),
        ("host_discovery", 0.10, "DC01.corp.local"),
        ("host_discovery", 0.10, "dc.corp.local"),
        ("host_discovery", 0.10, "389/tcp open LDAP"),
        ("host_discovery", 0.10, "88/tcp kerberos-sec"),
        ("host_discovery", 0.10, "it is a Domain Controller"),
        ("credential_discovery", 0.20, "Password: hunter2"),
        ("credential_discovery", 0.20, "the NTLM hash is 31d6"),
        ("credential_discovery", 0.20, "saved ticket in admin.ccache"),
        ("credential_discovery", 0.20, "credentials of krbtgt"),
        ("credential_discovery", 0.20, "asreproast found one"),
        ("credential_discovery", 0.20, "Kerberoast found one"),
        ("privilege_escalation", 0.35, "member of Domain Admins"),
        ("privilege_escalation", 0.35, "domain admin"),
        ("privilege_escalation", 0.35, "admin to web01"),
        ("privilege_escalation", 0.35, "Write DACL on the group"),
        ("privilege_escalation", 0.35, "WriteDacl on the group"),
        ("privilege_escalation", 0.35, "owns the group"),
        ("privilege_escalation", 0.35, "ForceChangePassword on casey"),
        ("privilege_escalation", 0.35, "AddMember on the group"),
    ],
)
def test_a_discovery_is_rewarded_by_what_a_command_brought_to_light(component: str, value: float, text: str) -> None:
    assert only(component).of_turn(found(text)) == {component: value}
    assert only(component, value=3).of_turn(found(text)) == {component: 3.0}


@pytest.mark.parametrize(
    ("component", "text"),
    [
        ("host_discovery", "8.8.8.8 and 172.32.0.1 and 110.1.2.3 and 10.1.2"),
        ("host_discovery", "abcdc.example, ldapsearch: nothing"),
        ("credential_discovery", "hashing passwordless credentialed"),
        ("privilege_escalation", "the domain administrator downs tools"),
    ],
)
def test_what_only_looks_like_a_discovery_is_none(component: str, text: str) -> None:
    assert only(component).of_turn(found(text)) == {component: 0.0}


def test_a_discovery_counts_for_each_result_but_not_for_what_a_failed_command_echoes() -> None:
    echo = ToolResult(text="password: command not found")
    twice = TurnRecord(results=(*found("a password").results, *found("a hash").results, echo))
    assert only("credential_discovery").of_turn(twice) == {"credential_discovery": 0.4}


def test_each_other_component_rewards_its_own_turns() -> None:
    assert only("reasoning_trace").of_turn(TurnRecord(reasoning="so that")) == {"reasoning_trace": 0.01}
    assert only("reasoning_trace").of_turn(TurnRecord(reasoning=" \n")) == {"reasoning_trace": 0.0}
    results = (ToolResult(text="out"), ToolResult(text=" "), ToolResult(text="no such tool", failed=True))
    assert only("tool_observation").of_turn(TurnRecord(results=results)) == {"tool_observation": 0.02}
    assert only("tool_error_penalty").of_turn(TurnRecord(results=results)) == {"tool_error_penalty": -0.2}
    assert only("tool_stop").of_turn(TurnRecord(results=results)) == {"tool_stop": 0.0}
    assert only("tool_stop").of_turn(TurnRecord(results=(ToolResult(text="", stops=True),))) == {"tool_stop": 0.15}
    assert ends(only("terminal_state")) == [1.0, -0.25, -0.35, -1.0]
    assert ends(only("terminal_state", stall_penalty=-2)) == [1.0, -2.0, -0.35, -1.0]
    assert ends(only("tool_stop")) == [0.0] * 4


TURN = TurnRecord(
    reasoning="why",
    results=(
        ToolResult(text="x", found="10.0.0.1 has a password of a domain admin", stops=True),
        ToolResult(text="", failed=True),
    ),
)


def test_the_heuristic_is_all_components_and_takes_a_weight_for_each() -> None:
    values = policy().of_turn(TURN)
    assert values == {
        "reasoning_trace": 0.01,
        "tool_observation": 0.02,
        "host_discovery": 0.10,
        "credential_discovery": 0.20,
        "privilege_escalation": 0.35,
        "tool_stop": 0.15,
        "tool_error_penalty": -0.20,
    }
    assert build_reward_policy(None) == policy()
    weights = {
        "reasoning_trace_bonus": 1,
        "tool_observation_reward": 2,
        "host_discovery_reward": 3,
        "credential_discovery_reward": 4,
        "privilege_escalation_reward": 5,
        "stop_tool_bonus": 6,
        "tool_error_penalty": 7,
        "terminal_success_reward": 8,
        "terminal_stall_penalty": 9,
        "terminal_max_steps_penalty": 10,
        "terminal_error_penalty": 11,
    }
    weighed = policy(**weights)
    assert list(weighed.of_turn(TURN).values()) == [1, 2, 3, 4, 5, 6, 7]
    assert ends(weighed) == [8, 9, 10, 11]


def test_goal_only_rewards_nothing_but_the_end() -> None:
    assert policy("goal_only_v1").of_turn(TURN) == {}
    assert ends(policy("goal_only_v1", success_reward=2)) == [2.0, -0.25, -0.35, -1.0]


def test_discovery_rewards_discoveries_and_the_end() -> None:
    rewards = policy("discovery_v1", credential_discovery_reward=0.5, max_steps_penalty=0)
    assert rewards.of_turn(TURN) == {
        "host_discovery": 0.10,
        "credential_discovery": 0.5,
        "privilege_escalation": 0.35,
    }
    assert ends(rewards) == [1.0, -0.25, 0.0, -1.0]


def test_components_are_put_together_whatever_the_name_and_one_may_come_twice() -> None:
    rewards = policy(
        "heuristic_v1",
        components=[{"name": "tool_stop"}, {"name": "tool_stop", "params": {"value": 1}}, {"name": "terminal_state"}],
        baseline="none",
        learn_from_errors=True,
    )
    assert rewards.of_turn(TURN) == {"tool_stop": 1.15}
    assert (rewards.baseline, rewards.learn_from_errors) == (Baseline.NONE, True)


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("heuristic_v2", {}, PRESETS),
        ("heuristic_v1", {"success_reward": 1}, ("'success_reward'", "terminal_success_reward")),
        ("goal_only_v1", {"host_discovery_reward": 1}, ("'host_discovery_reward'", "success_reward")),
        ("discovery_v1", {"host_discovery_reward": "much"}, ("host_discovery_reward must be a number", "'much'")),
        ("goal_only_v1", {"success_reward": True}, ("success_reward must be a number",)),
        ("goal_only_v1", {"success_reward": float("nan")}, ("success_reward must be a number",)),
        ("heuristic_v1", {"baseline": "best"}, ("turn_mean, none", "'best'")),
        ("heuristic_v1", {"learn_from_errors": "yes"}, ("learn_from_errors must be true or false",)),
        ("mine", {"components": []}, ("at least one",)),
        ("mine", {"components": ["tool_stop"]}, ("'tool_stop'", "name and params")),
        ("mine", {"components": [{"name": "tool_start"}]}, ("'tool_start'", *COMPONENTS)),
        ("mine", {"components": [{"name": "tool_stop", "params": {"bonus": 1}}]}, ("'bonus'", "value")),
        ("mine", {"components": [{"name": "tool_stop", "weight": 1}]}, ("'weight'", "name, params")),
        ("mine", {"components": [{"name": "tool_stop"}], "tool_error_penalty": 0}, ("'tool_error_penalty'",)),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused_in_words_that_mend_it(
    name: str, params: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(RewardError) as refused:
        check_world_reward(WorldRewardPolicy(name=name, params=params))
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_no_field_about_worlds_goes_unheard() -> None:
    dataset = {"name": "rows", "version": "1"}

    def wrong(**fields: Any) -> list[str]:
        config = TinkerRLJobConfig.model_validate({"algorithm": "ppo", **fields})
        return [str(mistake.loc[2]) for mistake in world_mistakes(config)]

    assert wrong(world_manifest_id="corp", world_goal="x", world_reward={"name": "goal_only_v1"}) == []
    assert wrong(prompt_dataset_ref=dataset, reward_recipe={"name": "row_reward_v1"}) == []
    assert wrong(prompt_dataset_ref=dataset, world_goal="x") == ["world_goal"]
    assert wrong(prompt_dataset_ref=dataset, world_reward={"name": "?"}) == ["world_reward", "world_reward"]
    assert wrong(
        world_manifest_id="corp",
        prompt_dataset_ref=dataset,
        trajectory_dataset_refs=[dataset],
        prompt_split="train",
        reward_recipe={"name": "row_reward_v1"},
        eval_dataset_ref=dataset,
    ) == ["prompt_dataset_ref", "trajectory_dataset_refs", "prompt_split", "reward_recipe", "eval_dataset_ref"]
