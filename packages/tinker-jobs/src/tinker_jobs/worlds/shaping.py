"""What the turns of a live episode are worth: the components of a reward policy, and its presets.

Free of torch and the SDK: the server checks policies with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Protocol

import attrs

from tinker_core.rewards import RewardError
from tinker_jobs.parameters import read_number


class EpisodeState(StrEnum):
    """How an episode ended."""

    FINISHED = "finished"
    """The goal was reached."""
    STALLED = "stalled"
    """The policy gave up, asked for nothing, or said wrongly that the goal was reached."""
    MAX_STEPS = "max_steps"
    """No turn, no command or no context was left."""
    ERROR = "error"
    """The world failed."""


@attrs.frozen(kw_only=True)
class ToolResult:
    """What came of one thing that the policy asked for."""

    text: str
    """What the policy reads."""
    found: str = ""
    """The part of it that a command which succeeded has brought to light."""
    failed: bool = False
    """Whether it could not be done at all: an unknown tool, unreadable arguments, a command that the world refused."""
    stops: bool = False
    """Whether it ends the episode."""


@attrs.frozen(kw_only=True)
class TurnRecord:
    """One reply of the policy and what came of it."""

    reasoning: str = ""
    results: tuple[ToolResult, ...] = ()


_HOST = re.compile(
    r"\b(?:10(?:\.\d{1,3}){3}|172\.(?:1[6-9]|2\d|3[01])(?:\.\d{1,3}){2}|192\.168(?:\.\d{1,3}){2}"
    r"|ldap|kerberos|domain controllers?)\b|\bdc\d*\.\w",
    re.IGNORECASE,
)
_CREDENTIAL = re.compile(
    r"\b(?:passwords?|hash(?:es)?|tickets?|ccache|credentials?|ntlm|krbtgt|asreproast|kerberoast)\b", re.IGNORECASE
)
_PRIVILEGE = re.compile(
    r"\b(?:domain admins?|admin to|write\s?dacl|owns|forcechangepassword|addmember)\b", re.IGNORECASE
)


def _results(test: Callable[[ToolResult], bool]) -> Callable[[TurnRecord], int]:
    return lambda turn: sum(map(test, turn.results))


def _matches(pattern: re.Pattern[str]) -> Callable[[TurnRecord], int]:
    return _results(lambda result: pattern.search(result.found) is not None)


@attrs.frozen(kw_only=True)
class _TurnComponent:
    default: float
    weight: str
    """Its parameter in ``heuristic_v1``."""
    count: Callable[[TurnRecord], int]
    """How often a turn earns it."""


TURN_COMPONENTS: Mapping[str, _TurnComponent] = {
    "reasoning_trace": _TurnComponent(
        default=0.01, weight="reasoning_trace_bonus", count=lambda turn: int(bool(turn.reasoning.strip()))
    ),
    "tool_observation": _TurnComponent(
        default=0.02,
        weight="tool_observation_reward",
        count=_results(lambda result: not result.failed and bool(result.text.strip())),
    ),
    "host_discovery": _TurnComponent(default=0.10, weight="host_discovery_reward", count=_matches(_HOST)),
    "credential_discovery": _TurnComponent(
        default=0.20, weight="credential_discovery_reward", count=_matches(_CREDENTIAL)
    ),
    "privilege_escalation": _TurnComponent(
        default=0.35, weight="privilege_escalation_reward", count=_matches(_PRIVILEGE)
    ),
    "tool_stop": _TurnComponent(default=0.15, weight="stop_tool_bonus", count=_results(lambda result: result.stops)),
    "tool_error_penalty": _TurnComponent(
        default=-0.20, weight="tool_error_penalty", count=_results(lambda result: result.failed)
    ),
}
"""Components that reward turns, by name."""
TERMINAL_STATE = "terminal_state"
"""The component that rewards the end of an episode."""
_TERMINAL = {
    "success_reward": (EpisodeState.FINISHED, 1.0),
    "stall_penalty": (EpisodeState.STALLED, -0.25),
    "max_steps_penalty": (EpisodeState.MAX_STEPS, -0.35),
    "error_penalty": (EpisodeState.ERROR, -1.0),
}
COMPONENTS = (*TURN_COMPONENTS, TERMINAL_STATE)
DEFAULT_PRESET = "heuristic_v1"
_DISCOVERIES = ("host_discovery", "credential_discovery", "privilege_escalation")
_PRESETS: Mapping[str, tuple[Mapping[str, str], str]] = {
    DEFAULT_PRESET: ({one.weight: name for name, one in TURN_COMPONENTS.items()}, "terminal_"),
    "goal_only_v1": ({}, ""),
    "discovery_v1": ({TURN_COMPONENTS[name].weight: name for name in _DISCOVERIES}, ""),
}
# By preset: the components that its parameters weigh, and what precedes the parameters of its terminal state.
PRESETS = tuple(_PRESETS)


class Baseline(StrEnum):
    """What is taken from a turn's reward-to-go to make its advantage."""

    TURN_MEAN = "turn_mean"
    """Its mean over all episodes of the step, in which one that has ended counts as 0."""
    NONE = "none"
    """Nothing."""


@attrs.frozen(kw_only=True)
class RewardPolicy:
    """A reward policy with all its values."""

    turn_values: tuple[tuple[str, float], ...]
    """Pairs of component and value."""
    terminal_values: tuple[Mapping[EpisodeState, float], ...]
    baseline: Baseline = Baseline.TURN_MEAN
    learn_from_errors: bool = False
    """Whether an episode that the world has failed counts."""

    def of_turn(self, turn: TurnRecord) -> dict[str, float]:
        """What a turn earns, by component."""
        earned: dict[str, float] = {}
        for name, value in self.turn_values:
            earned[name] = earned.get(name, 0.0) + value * TURN_COMPONENTS[name].count(turn)
        return earned

    def of_end(self, state: EpisodeState) -> float:
        """What the end of an episode is worth."""
        return sum(values[state] for values in self.terminal_values)


class NamedPolicy(Protocol):
    """A reward policy as a request has it."""

    @property
    def name(self) -> str:
        """A preset; only a label where ``params.components`` are given."""

    @property
    def params(self) -> Mapping[str, Any]:
        """Its settings."""


def build_reward_policy(policy: NamedPolicy | None) -> RewardPolicy:
    """The policy of a request, ``heuristic_v1`` where it has none; raises `RewardError`."""
    params = {} if policy is None else dict(policy.params)
    common = _common(params)
    if "components" in params:
        components = params.pop("components")
        _refuse_unknown(params, (), "params beside components")
        return _compose(components, common)
    name = DEFAULT_PRESET if policy is None else policy.name
    if name not in _PRESETS:
        raise RewardError(f"unknown world reward policy {name!r}; choose {', '.join(PRESETS)}, or give components")
    weights, prefix = _PRESETS[name]
    terminal = {f"{prefix}{key}": key for key in _TERMINAL}
    _refuse_unknown(params, (*weights, *terminal), f"params of {name}")
    return RewardPolicy(
        turn_values=tuple(
            (component, read_number(params, weight, TURN_COMPONENTS[component].default))
            for weight, component in weights.items()
        ),
        terminal_values=(_terminal({terminal[key]: value for key, value in params.items() if key in terminal}),),
        **common,
    )


def check_world_reward(policy: NamedPolicy) -> None:
    """Raise `RewardError` for an unknown preset, component or parameter, or a value that is no number."""
    build_reward_policy(policy)


def _common(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters that every policy has; taken out of ``params``."""
    baseline, learns = params.pop("baseline", Baseline.TURN_MEAN), params.pop("learn_from_errors", False)
    if baseline not in tuple(Baseline):
        raise RewardError(f"baseline must be one of {', '.join(Baseline)}, got {baseline!r}")
    if not isinstance(learns, bool):
        raise RewardError(f"learn_from_errors must be true or false, got {learns!r}")
    return {"baseline": Baseline(baseline), "learn_from_errors": learns}


def _compose(components: object, common: Mapping[str, Any]) -> RewardPolicy:
    if not isinstance(components, Sequence) or isinstance(components, str) or not components:
        raise RewardError("components must be a list of at least one {name, params}")
    turns: list[tuple[str, float]] = []
    terminal: list[Mapping[EpisodeState, float]] = []
    for component in components:
        if not isinstance(component, Mapping) or not isinstance(component.get("params", {}), Mapping):
            raise RewardError(f"a component must be an object with name and params, got {component!r:.60}")
        _refuse_unknown(component, ("name", "params"), "a component")
        name, params = str(component.get("name")), component.get("params", {})
        if name == TERMINAL_STATE:
            _refuse_unknown(params, tuple(_TERMINAL), f"params of {name}")
            terminal.append(_terminal(params))
        elif name in TURN_COMPONENTS:
            _refuse_unknown(params, ("value",), f"params of {name}")
            turns.append((name, read_number(params, "value", TURN_COMPONENTS[name].default)))
        else:
            raise RewardError(f"unknown component {name!r}; choose among {', '.join(COMPONENTS)}")
    return RewardPolicy(turn_values=tuple(turns), terminal_values=tuple(terminal), **common)


def _terminal(params: Mapping[str, object]) -> Mapping[EpisodeState, float]:
    return {state: read_number(params, key, default) for key, (state, default) in _TERMINAL.items()}


def _refuse_unknown(given: Mapping[str, object], known: Sequence[str], what: str) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise RewardError(f"{what}: unknown {', '.join(map(repr, unknown))}; known are {', '.join(known) or 'none'}")
