"""One episode in a live world."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import httpx

from tinker_jobs.rl.rollouts import Policy
from tinker_jobs.rows import Message
from tinker_jobs.worlds.runtime import CommandOutput, RefusedCommandError, World, WorldError, WorldSession
from tinker_jobs.worlds.shaping import EpisodeState, RewardPolicy, ToolResult, TurnRecord
from tinker_jobs.worlds.tools import TOOLS, BadCall, Call, CallForm, FinishCall, RunCall, read_reply
from tinker_jobs.worlds.turns import Replies, Sample

MAX_OUTPUT_CHARS = 4000
"""How much of a command's output a policy is shown."""


@attrs.frozen(kw_only=True)
class EpisodeRules:
    """What all episodes of a job have in common."""

    world: World
    form: CallForm
    replies: Replies
    rewards: RewardPolicy
    messages: tuple[Message, ...]
    """What every episode begins with."""
    max_turns: int
    max_commands: int | None


@attrs.frozen(kw_only=True)
class _Done:
    """What came of a call."""

    result: ToolResult | None = None
    state: EpisodeState | None = None
    """How the episode ended with it."""


@attrs.define(kw_only=True)
class Episode:
    """An episode while it is played, and afterwards what became of it."""

    rules: EpisodeRules
    samples: list[Sample] = attrs.field(factory=list)
    rewards: list[float] = attrs.field(factory=list)
    """Of each turn; that of the end is in the last one."""
    earned: dict[str, float] = attrs.field(factory=dict)
    """By component, over the whole episode."""
    num_commands: int = 0
    num_failed_calls: int = 0
    state: EpisodeState | None = None
    """None while it goes on."""
    error: str | None = None
    """How the world failed."""

    async def play(self, policy: Policy, client: httpx.AsyncClient) -> Episode:
        """Play to the end. Raises `JobFailedError` when not even the first prompt fits the model."""
        session, messages = WorldSession(self.rules.world, client), list(self.rules.messages)
        state = None
        while state is None:
            state = await self._take_turn(policy, session, messages)
        self.state = state
        self.rewards[-1] += self.rules.rewards.of_end(state)
        return self

    async def _take_turn(self, policy: Policy, session: WorldSession, messages: list[Message]) -> EpisodeState | None:
        """One reply and what comes of it, added to ``messages``; how the episode ended, if it did."""
        rules = self.rules
        tools = TOOLS if rules.form is CallForm.TEMPLATE else ()
        sample = await rules.replies.draw(policy, messages, tools)
        if sample is None:
            if not self.samples:
                raise rules.replies.no_room_error(messages, tools)
            return EpisodeState.MAX_STEPS
        reply = read_reply(sample.text, rules.form)
        results, state = await self._act(reply.calls, session)
        self._record(sample, TurnRecord(reasoning=reply.reasoning, results=tuple(results)))
        messages += [{"role": "assistant", "content": sample.text}, *self._answers(results)]
        if state is None and len(self.samples) == rules.max_turns:
            return EpisodeState.MAX_STEPS
        return state

    async def _act(self, calls: Sequence[Call], session: WorldSession) -> tuple[list[ToolResult], EpisodeState | None]:
        """Do what a reply asks for, up to what ends the episode."""
        results: list[ToolResult] = []
        for call in calls:
            done = await self._do(call, session)
            if done.result is not None:
                results.append(done.result)
            if done.state is not None:
                return results, done.state
        return results, None if calls else EpisodeState.STALLED

    async def _do(self, call: Call, session: WorldSession) -> _Done:
        match call:
            case BadCall():
                return _Done(result=ToolResult(text=call.reason, failed=True))
            case FinishCall():
                # A world that reports the goal has ended the episode before, had it been reached.
                if call.success and not self.rules.world.reports_goal:
                    return _Done(result=ToolResult(text="", stops=True), state=EpisodeState.FINISHED)
                return _Done(state=EpisodeState.STALLED)
            case RunCall():
                return await self._run(call.command, session)

    async def _run(self, command: str, session: WorldSession) -> _Done:
        if self.num_commands == self.rules.max_commands:
            return _Done(state=EpisodeState.MAX_STEPS)
        self.num_commands += 1
        try:
            output = await session.run(command)
        except RefusedCommandError as error:
            return _Done(result=ToolResult(text=clip(str(error)), failed=True))
        except WorldError as error:
            self.error = str(error)
            return _Done(state=EpisodeState.ERROR)
        state = self._state_after(output)
        return _Done(result=_result(output, stops=state is not None), state=state)

    def _state_after(self, output: CommandOutput) -> EpisodeState | None:
        if not (output.goal_reached or output.stop):
            return None
        # A world that never tells of the goal means by a stop that all is done.
        reached = not self.rules.world.reports_goal if output.goal_reached is None else output.goal_reached
        return EpisodeState.FINISHED if reached else EpisodeState.STALLED

    def _record(self, sample: Sample, turn: TurnRecord) -> None:
        earned = self.rules.rewards.of_turn(turn)
        for name, value in earned.items():
            self.earned[name] = self.earned.get(name, 0.0) + value
        self.samples.append(sample)
        self.rewards.append(sum(earned.values()))
        self.num_failed_calls += sum(result.failed for result in turn.results)

    def _answers(self, results: Sequence[ToolResult]) -> list[Message]:
        texts = [result.text or "(no output)" for result in results]
        if self.rules.form is CallForm.TEMPLATE:
            return [{"role": "tool", "content": text} for text in texts]
        return [{"role": "user", "content": "\n\n".join(texts)}]


def _result(output: CommandOutput, *, stops: bool) -> ToolResult:
    status = "" if output.exit_code == 0 else f"(exit code {output.exit_code})"
    parts = (output.stdout.rstrip(), output.stderr.rstrip(), status)
    return ToolResult(
        text="\n".join(clip(part) for part in parts if part),
        # What a failed command says may be the policy's own words, sent back.
        found=clip(output.stdout) if output.exit_code == 0 else "",
        stops=stops,
    )


def clip(text: str) -> str:
    """The beginning of a text that may be long, and how much was left out."""
    left_out = len(text) - MAX_OUTPUT_CHARS
    return text if left_out <= 0 else f"{text[:MAX_OUTPUT_CHARS]}\n({left_out} more characters)"
