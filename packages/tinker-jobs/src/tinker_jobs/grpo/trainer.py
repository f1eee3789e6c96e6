"""GRPO jobs: rollout workers on Ray answer prompts, the learner in the job's process trains on them.

- ``async``: workers answer on while the model trains, as far ahead as the buffer has places; a step takes the prompts
  whose answers come first.
- ``colocated``: workers and learner share a node and take turns.
- ``distributed``: workers are spread over all nodes; a step's prompts are answered by all of them at once, and then
  trained on.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable

import attrs
import tinker

from tinker_jobs.grpo.buffer import ExperienceBuffer
from tinker_jobs.grpo.cluster import RayWorkers, check_reach, existing_ray, local_ray
from tinker_jobs.grpo.groups import Asked, PromptGroup, PublishedPolicy
from tinker_jobs.grpo.learner import Learner
from tinker_jobs.grpo.plan import PromptPlan
from tinker_jobs.grpo.pool import Worker, WorkerPool
from tinker_jobs.grpo.report import Report
from tinker_jobs.grpo.settings import GRPOSettings
from tinker_jobs.grpo.worker import WorkerSpec
from tinker_jobs.requests import RayGRPOJobConfig
from tinker_jobs.rl.prompt_rows import PromptReader, find_prompts
from tinker_jobs.worker.run import JobRun, checkpoint_name

RAY_ADDRESS, SERVER_URL = "jobs-ray-address", "jobs-ray-server-url"
"""Options of the service."""


def run_grpo(run: JobRun) -> None:
    """Do what a `RayGRPOJobConfig` says. Raises `JobFailedError` and `CancelledJobError`."""
    address, server_url = (str(run.spec.options.get(name) or "") for name in (RAY_ADDRESS, SERVER_URL))
    if address and server_url:
        # For this process too: its clients are handed to the workers with the URL that they have.
        run.spec = attrs.evolve(run.spec, base_url=server_url)
    work = prepare(run)
    beside_learner = work.settings.execution_mode == "colocated"
    with existing_ray(address) if address else local_ray(run.spec.directory, work.settings.num_workers):
        if not beside_learner:
            check_reach(run.spec.base_url)
        train(run, work, RayWorkers(work.worker_spec, beside_learner=beside_learner).spawn)


@attrs.frozen(kw_only=True)
class Work:
    """What a job has to do."""

    settings: GRPOSettings
    plan: PromptPlan
    worker_spec: WorkerSpec


def prepare(run: JobRun) -> Work:
    """Read what the job needs. Raises `JobFailedError` for a dataset that cannot be used."""
    config, dataset, task = run.request.config, run.refs.prompt_dataset, run.refs.task
    assert isinstance(config, RayGRPOJobConfig)
    assert dataset is not None
    settings = GRPOSettings.of(config, task)
    max_new_tokens = settings.max_new_tokens_in(run.context_length)
    prompts = PromptReader(run, max_new_tokens).read(find_prompts(dataset), None, str(dataset))
    return Work(
        settings=attrs.evolve(settings, max_new_tokens=max_new_tokens),
        plan=PromptPlan(
            prompts,
            num_prompts=settings.num_prompts,
            epochs=settings.epochs,
            state=None if run.spec.resume is None else run.spec.resume.extra,
        ),
        worker_spec=WorkerSpec(
            tokenizer=run.tokenizer,
            api_key=run.spec.api_key,
            plugins=run.spec.plugins,
            recipe=settings.recipe,
            params=settings.params,
            verification=None if task is None else task.verification,
            group_size=settings.group_size,
            max_new_tokens=max_new_tokens,
            temperature=settings.temperature,
        ),
    )


def train(run: JobRun, work: Work, spawn: Callable[[], Worker]) -> None:
    """Do the work with workers from wherever. Raises `JobFailedError` and `CancelledJobError`."""
    try:
        asyncio.run(GRPOTraining(run, work, spawn).run())
    except BaseExceptionGroup as group:
        raise _first(group) from group


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that ended all tasks; the others are its consequences."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class GRPOTraining:
    """One process of a job, once there is somewhere to start workers."""

    def __init__(self, run: JobRun, work: Work, spawn: Callable[[], Worker]) -> None:
        self._run = run
        self._settings = work.settings
        self._plan = work.plan
        self._spawn = spawn
        self._buffer: ExperienceBuffer[PromptGroup] = ExperienceBuffer(work.settings.buffer_size)
        self._report = Report(run, work.settings, work.plan.num_steps)

    async def run(self) -> None:
        """The whole job, or what is left of it; errors come in an `ExceptionGroup`."""
        async with asyncio.TaskGroup() as tasks:
            pool = WorkerPool(
                self._spawn,
                num_workers=self._settings.num_workers,
                prompts_per_worker=math.ceil(self._settings.num_prompts / self._settings.num_workers),
                tasks=tasks,
                log=self._run.log,
            )
            try:
                pool.start()
                await self._train(tasks, pool)
            finally:
                pool.close()

    async def _train(self, tasks: asyncio.TaskGroup, pool: WorkerPool) -> None:
        client = await asyncio.to_thread(self._run.open_training_client, rank=self._settings.lora_rank)
        learner = Learner(client, self._settings)
        await self._publish(learner, self._run.first_step - 1)
        self._report.begin()
        if self._settings.runs_ahead:
            tasks.create_task(self._feed(self._plan.take(), tasks, pool))
        for step in range(self._run.first_step, self._plan.num_steps + 1):
            self._run.check_cancelled()
            size = self._plan.size_of(step)
            if not self._settings.runs_ahead:
                await self._feed(self._plan.take(size), tasks, pool)
            groups = await self._buffer.take(size)
            learned = await asyncio.to_thread(learner.train, groups)
            self._plan.finish(group.asked for group in groups)
            if step < self._plan.num_steps:
                await self._publish(learner, step)
            self._report.step(step, groups, learned=learned, num_pending=self._buffer.reserved)
            await self._save(client, step)
            self._run.check_cancelled()
        await self._save_as(client, "final", self._plan.num_steps)
        self._report.end(num_lost_workers=pool.num_lost)

    async def _publish(self, learner: Learner, version: int) -> None:
        self._policy: PublishedPolicy = await asyncio.to_thread(learner.publish, version)
        self._report.published(version)

    async def _feed(self, prompts: Iterable[Asked], tasks: asyncio.TaskGroup, pool: WorkerPool) -> None:
        """Have prompts answered, each as soon as the buffer has a place for it."""
        for asked in prompts:
            await self._buffer.reserve()
            tasks.create_task(self._answer(asked, pool))

    async def _answer(self, asked: Asked, pool: WorkerPool) -> None:
        self._buffer.put(await pool.roll_out(asked, lambda: self._policy))

    async def _save(self, client: tinker.TrainingClient, step: int) -> None:
        name = checkpoint_name(step, self._settings.checkpoint_interval, self._plan.num_steps)
        if name is not None:
            await self._save_as(client, name, step)

    async def _save_as(self, client: tinker.TrainingClient, name: str, step: int) -> None:
        await asyncio.to_thread(self._run.save_checkpoint, client, name, step, self._plan.state)
