"""What the engine answers by itself: custom losses and their owners, optimizer families, and what it logs once."""

from __future__ import annotations

import asyncio
import logging

import attrs
import pytest

from tests.core.conftest import Client, EngineFactory, datum, forward_backward, optim_step
from tests.core.gate_sampler import Gate
from tinker_core.engine import NewSession
from tinker_core.engine.admission import MAX_LOSSES
from tinker_core.errors import PluginError
from tinker_core.hookspecs import hookimpl
from tinker_core.interfaces import LossPlugin
from tinker_core.plugins import Plugins
from tinker_core.testing.graph_builder import GraphBuilder, clipped_policy_loss
from tinker_core.types import (
    CreateCustomLossInput,
    CreateCustomLossOutput,
    CustomLoss,
    EngineOutput,
    ForwardBackwardInput,
    OptimizerConfig,
    OptimStepInput,
    OptimStepOutput,
    RequestError,
)


async def create(client: Client, loss: CustomLoss, seq_id: int = 0) -> EngineOutput:
    return await client.run(CreateCustomLossInput(session_id=client.session_id, custom_loss_seq_id=seq_id, loss=loss))


def custom_pass(model_id: str, seq_id: int, loss_id: str | None) -> ForwardBackwardInput:
    config: dict[str, float | str] = {} if loss_id is None else {"loss_id": loss_id}
    return attrs.evolve(forward_backward(model_id, seq_id), loss_fn="custom", loss_fn_config=config)


def message(output: EngineOutput) -> str:
    assert isinstance(output, RequestError)
    assert output.category == "user"
    return output.message


def test_losses_belong_to_their_session_and_failures_keep_their_place(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            made = await create(client, clipped_policy_loss())
            assert isinstance(made, CreateCustomLossOutput)
            assert made.loss_id not in (client.session_id, "loss-0")
            other = Client(client.engine, (await client.engine.create_session(NewSession())).session_id)
            mine, theirs = await client.create(), await other.create()
            # The fakes run no custom loss: whoever may name this one is told so, nobody else learns that it exists.
            assert "not offered" in message(await client.run(custom_pass(mine, 1, made.loss_id)))
            for loss_id in (made.loss_id, "loss-0"):
                seq_id = 1 if loss_id == made.loss_id else 2
                assert "unknown custom loss" in message(await other.run(custom_pass(theirs, seq_id, loss_id)))
            assert "loss_id" in message(await other.run(custom_pass(theirs, 3, None)))
            assert isinstance(await other.run(optim_step(theirs, 4)), OptimStepOutput)
            await client.engine.finish_session(client.session_id, "success", None, "local")

    asyncio.run(body())


def test_a_graph_that_is_not_allowed_is_refused_in_its_future(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            graph = GraphBuilder(logprobs=1)
            bad = graph.returns(graph.call("os.system", graph["logprobs"]))
            assert "node 'node_1': function 'os.system'" in message(await create(client, bad))
            for index in range(1, MAX_LOSSES + 1):
                assert isinstance(await create(client, clipped_policy_loss(), index), CreateCustomLossOutput)
            assert str(MAX_LOSSES) in message(await create(client, clipped_policy_loss(), MAX_LOSSES + 1))

    asyncio.run(body())


def test_another_optimizer_is_refused_before_anything_is_made(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            await client.engine.wait_ready()
            dimuon = OptimizerConfig(type="dimuon", settings={"version": 1})
            refused = await client.run(attrs.evolve(client.create_input(0), optimizer_config=dimuon))
            assert "'dimuon' is not installed; installed optimizers: adamw" in message(refused)
            model_id = await client.create(1)
            step = OptimStepInput(model_id=model_id, seq_id=1, optimizer_params={"type": "dimuon"})
            assert "send adam_params" in message(await client.run(step))
            assert isinstance(await client.run(optim_step(model_id, 2)), OptimStepOutput)

    asyncio.run(body())


def test_the_log_says_once_per_run_whose_objective_it_is(
    open_engine: EngineFactory, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        async with open_engine() as client:
            models = [await client.create(index) for index in range(2)]
            for model_id in models:
                for seq_id in (1, 2):
                    plain = forward_backward(model_id, seq_id, datum([1, 2]))
                    await client.run(attrs.evolve(plain, loss_fn="stable_reinforce"))
            lines = [record.getMessage() for record in caplog.records if "stable_reinforce" in record.getMessage()]
            assert [line.split()[1] for line in lines] == models

    with caplog.at_level(logging.WARNING):
        asyncio.run(body())


def test_no_plugin_takes_the_name_of_custom_losses() -> None:
    class Taking:
        @hookimpl
        def tinker_register_loss(self, register):
            register(LossPlugin(name="custom", compute=lambda logprobs, context: logprobs.sum()))

    plugins = Plugins()
    plugins.register(Taking(), "taking")
    with pytest.raises(PluginError, match="'custom'"):
        plugins.losses()


# --- adapters that the sampler could not serve ------------------------------------------------------------------------


@pytest.mark.parametrize("ready", [True, False], ids=["while-it-runs", "while-it-starts"])
def test_a_model_that_the_sampler_could_not_serve_is_refused_when_it_is_created(
    open_engine: EngineFactory, ready: bool
) -> None:
    async def body() -> None:
        gate = Gate(max_lora_rank=4, lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"))
        async with open_engine(sampler="gate", more_plugins={"gate": gate}) as client:
            if ready:
                await client.engine.wait_ready()
            only_attention = attrs.evolve(client.create_input().lora_config, train_mlp=False, train_unembed=False)
            bad_rank = attrs.evolve(only_attention, rank=5)
            everything = attrs.evolve(only_attention, train_mlp=True, train_unembed=True)
            outputs = [
                await client.run(attrs.evolve(client.create_input(number), lora_config=lora_config))
                for number, lora_config in enumerate((bad_rank, everything, only_attention))
            ]
            assert [getattr(output, "code", None) for output in outputs] == ["InvalidLoraConfigError"] * 2 + [None]
            assert "up to 4" in getattr(outputs[0], "message", "")
            assert "adapts down_proj, lm_head, up_proj" in getattr(outputs[1], "message", "")

    asyncio.run(body())
