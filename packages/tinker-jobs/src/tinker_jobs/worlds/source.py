"""Rollouts from episodes in a live world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tinker_jobs.errors import JobFailedError
from tinker_jobs.refs import FrozenRefs
from tinker_jobs.requests import TinkerRLJobConfig
from tinker_jobs.rl.prompts import fill, with_system
from tinker_jobs.rl.rollouts import Policy, Rollout
from tinker_jobs.rl.settings import RLSettings
from tinker_jobs.rows import Message
from tinker_jobs.worker.run import JobRun
from tinker_jobs.worlds.checking import world_mistakes
from tinker_jobs.worlds.episode import Episode, EpisodeRules
from tinker_jobs.worlds.runtime import World
from tinker_jobs.worlds.shaping import Baseline, EpisodeState, build_reward_policy
from tinker_jobs.worlds.tools import CallForm, call_form, describe
from tinker_jobs.worlds.turns import Replies, advantages, gather_episodes

DEFAULT_GOAL = "Domain Admins"
DEFAULT_EPISODES = 8
DEFAULT_MAX_TURNS = 8
DEFAULT_AGENT = (
    "You act in a live environment by running commands. Work towards the goal step by step: look around, let what you "
    "find decide what to try next, and end the task once the goal is reached or nothing more can be done."
)


class WorldSource:
    """Each step plays several episodes of one world at once; every reply of the policy is a turn to learn from."""

    def __init__(self, run: JobRun, rules: EpisodeRules, num_episodes: int) -> None:
        self._run = run
        self._rules = rules
        self._num_episodes = num_episodes

    @classmethod
    def open(cls, run: JobRun, config: TinkerRLJobConfig) -> WorldSource:
        """The world of a job; raises `JobFailedError` when it does not answer, and `RewardError`."""
        frozen = run.refs.world
        if frozen is None:
            raise JobFailedError("live rollouts need a world; give world_manifest_id")
        for mistake in world_mistakes(config):
            raise JobFailedError(mistake.msg)
        world, replies = World.open(frozen), Replies.of_job(run, RLSettings.of(config))
        form = call_form(replies.tokenizer, world)
        num_episodes = config.num_rollouts or config.batch_size or DEFAULT_EPISODES
        rules = EpisodeRules(
            world=world,
            form=form,
            replies=replies,
            rewards=build_reward_policy(config.world_reward),
            messages=tuple(first_messages(run.refs, config.world_goal, world, form)),
            max_turns=config.max_turns or DEFAULT_MAX_TURNS,
            max_commands=config.max_episode_steps,
        )
        return cls(run, rules, min(num_episodes, config.batch_size or num_episodes))

    async def collect(self, step: int, policy: Policy) -> tuple[Rollout, ...]:
        """Play the episodes of a step; raises `JobFailedError` when the world failed all of them."""
        async with self._rules.world.client(self._num_episodes) as client:
            games = [Episode(rules=self._rules).play(policy, client) for _ in range(self._num_episodes)]
            episodes = await gather_episodes(games)
        self._report_failures(step, episodes)
        return self._rollouts(episodes)

    async def evaluate(self, policy: Policy) -> Mapping[str, float]:
        """Nothing: worlds are not evaluated on datasets."""
        return {}

    def _report_failures(self, step: int, episodes: Sequence[Episode]) -> None:
        errors = [episode.error for episode in episodes if episode.error is not None]
        if len(errors) == len(episodes):
            raise JobFailedError(f"the world failed all {len(errors)} episodes of step {step}: {errors[0]}")
        if errors:
            message = f"the world failed {len(errors)} of {len(episodes)} episodes of step {step}: {errors[0]}"
            self._run.log(message, level="warning", step=step)

    def _rollouts(self, episodes: Sequence[Episode]) -> tuple[Rollout, ...]:
        rewards = self._rules.rewards
        counted = [one for one in episodes if one.state is not EpisodeState.ERROR or rewards.learn_from_errors]
        values = advantages([one.rewards for one in counted], has_baseline=rewards.baseline is Baseline.TURN_MEAN)
        of_episode = {id(episode): value for episode, value in zip(counted, values, strict=True)}
        return tuple(_rollout(episode, of_episode.get(id(episode), ())) for episode in episodes)


def first_messages(refs: FrozenRefs, goal: str | None, world: World, form: CallForm) -> list[Message]:
    """What every episode begins with: who the policy is, how it acts, and what it is to reach."""
    assert refs.world is not None
    instruction = refs.task.instruction if refs.task is not None else None
    parts = (
        refs.capability.prompt,
        refs.world.agent_prompt or DEFAULT_AGENT,
        None if instruction is None else fill(instruction, {}),
        describe(world, form),
    )
    system = "\n\n".join(part for part in parts if part)
    goal = goal or refs.world.goal or DEFAULT_GOAL
    return with_system([{"role": "user", "content": f"Goal: {goal}"}], system)


def _rollout(episode: Episode, values: Sequence[float]) -> Rollout:
    """``values`` are the advantages of its turns; there are none for an episode that is not learned from."""
    states = {f"world/{state}": float(episode.state is state) for state in EpisodeState}
    earned = {f"world/reward/{name}": value for name, value in episode.earned.items()}
    return Rollout(
        turns=tuple(
            sample.turn(value) for sample, value in zip(episode.samples, values, strict=False) if sample.completion
        ),
        reward=sum(episode.rewards),
        metrics={
            "world/turns": float(len(episode.samples)),
            "world/commands": float(episode.num_commands),
            "world/failed_calls": float(episode.num_failed_calls),
            **states,
            **earned,
        },
    )
