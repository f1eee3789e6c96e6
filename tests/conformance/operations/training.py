"""Sessions, models, passes and steps."""

from __future__ import annotations

import numpy as np
import tinker
from operations.bridge import (
    BASE_MODEL,
    RANK,
    SEQUENCE,
    Client,
    close,
    datum,
    differs,
    done,
    logprobs_of,
    model_logprobs,
    needs,
    needs_adam_field,
    needs_class,
    needs_loss,
    new_model,
    operation,
    refused,
    step,
    tokens,
)
from tinker import types

NUM_DATUMS = 1030
"""More than one request's worth in every release: 128 datums at first, 1024 later."""


@operation("ServiceClient")
def service_client(client: Client) -> None:
    client.service = tinker.ServiceClient(user_metadata={"purpose": "conformance"})


@operation("get_server_capabilities")
def capabilities(client: Client) -> None:
    models = done(client.service.get_server_capabilities()).supported_models
    (model,) = [model for model in models if model.model_name == BASE_MODEL]
    if hasattr(model, "max_context_length"):
        assert model.max_context_length >= 64


@operation("create_rest_client")
def create_rest_client(client: Client) -> None:
    client.rest = done(client.service.create_rest_client())
    assert isinstance(client.rest, tinker.lib.public_interfaces.rest_client.RestClient)


@operation("RestClient.get_server_capabilities")
def rest_capabilities(client: Client) -> None:
    found = done(needs(client.rest, "get_server_capabilities")())
    assert BASE_MODEL in [model.model_name for model in found.supported_models]


@operation("create_lora_training_client")
def create_training_client(client: Client) -> None:
    client.model = new_model(client, user_metadata={"colour": "blue"})
    client.model_id = str(client.model.model_id)
    client.session_id, kind, number = client.model_id.split(":")
    assert (kind, number) == ("train", "0")


@operation("create_lora_training_client(optimizer)")
def create_with_optimizer(client: Client) -> None:
    needs(client.service, "create_lora_training_client", "optimizer")
    model = new_model(client, optimizer=needs_class("AdamOptimizerConfig")())
    assert model_logprobs(model).shape == (len(SEQUENCE) - 1,)


@operation("get_info")
def get_info(client: Client) -> None:
    info = done(client.model.get_info())
    assert info.model_data.model_name == BASE_MODEL
    assert info.lora_rank == RANK
    assert info.is_lora


@operation("TrainingClient.get_tokenizer")
def training_tokenizer(client: Client) -> None:
    tokenizer = client.model.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("Hello!")) == "Hello!"


@operation("forward")
def forward(client: Client) -> None:
    weights = [0.0, 0.5, *[2.0] * (len(SEQUENCE) - 3)]
    output = done(client.model.forward([datum(weights=weights)], "cross_entropy"))
    logprobs = logprobs_of(output)
    assert logprobs.shape == (len(SEQUENCE) - 1,)
    assert (logprobs < 0).all()
    close(output.metrics["loss:sum"], -np.dot(weights, logprobs), 1e-3)
    client.untrained = logprobs
    close(model_logprobs(client.model), client.untrained)


@operation("forward_backward cross_entropy")
def forward_backward(client: Client) -> None:
    output = done(client.model.forward_backward([datum(), datum(tokens(5, 3))], "cross_entropy"))
    close(logprobs_of(output), client.untrained)
    expected = -(client.untrained.sum() + logprobs_of(output, 1).sum())
    close(output.metrics["loss:sum"], expected, 1e-3)


@operation("optim_step")
def optim_step(client: Client) -> None:
    losses = [step(client.model) for _ in range(4)]
    assert losses[-1] < losses[0] - 1, f"the loss does not fall: {losses}"
    client.trained = model_logprobs(client.model)
    differs(client.trained, client.untrained)


def policy_loss(client: Client, name: str, config: dict[str, float] | None = None, **inputs: np.ndarray) -> float:
    """The loss at ratio 1, where most have a simple value; sums of log-probabilities are checked too."""
    advantages = np.linspace(-1, 2, len(SEQUENCE) - 1, dtype=np.float32)
    now = model_logprobs(client.model).astype(np.float32)
    data = [datum(logprobs=now, advantages=advantages, **inputs)]
    output = done(client.model.forward_backward(data, needs_loss(name), config))
    close(logprobs_of(output), now)
    client.ratio_one = {"reinforce": -float(advantages.sum()), "weighted": -float((advantages * now).sum())}
    return float(output.metrics["loss:sum"])


@operation("forward_backward importance_sampling")
def importance_sampling(client: Client) -> None:
    loss = policy_loss(client, "importance_sampling")
    close(loss, client.ratio_one["reinforce"], 1e-2)


@operation("forward_backward ppo")
def ppo(client: Client) -> None:
    loss = policy_loss(client, "ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1})
    close(loss, client.ratio_one["reinforce"], 1e-2)


@operation("forward_backward cispo")
def cispo(client: Client) -> None:
    loss = policy_loss(client, "cispo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2})
    close(loss, client.ratio_one["weighted"], 1e-2)


@operation("forward_backward dro")
def dro(client: Client) -> None:
    loss = policy_loss(client, "dro", {"beta": 0.05})
    close(loss, client.ratio_one["weighted"], 1e-2)


@operation("forward_backward gspo")
def gspo(client: Client) -> None:
    config = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}
    mask = np.ones(len(SEQUENCE) - 1, np.float32)
    loss = policy_loss(client, needs_loss("gspo"), config, sequence_ratio_mask=mask)
    close(loss, client.ratio_one["reinforce"], 1e-2)


@operation("forward_backward stable_reinforce")
def stable_reinforce(client: Client) -> None:
    assert np.isfinite(policy_loss(client, needs_loss("stable_reinforce")))


@operation("Datum provenance")
def provenance(client: Client) -> None:
    prompt_span, sampled_span = needs_class("PromptProvenanceSpan"), needs_class("SampledProvenanceSpan")
    length = len(SEQUENCE) - 1
    marked = datum().with_provenance(
        model_input=[prompt_span(sequence_id="a", offset=0, length=length)],
        loss_fn_inputs=[
            prompt_span(sequence_id="a", offset=0, length=4),
            sampled_span(sequence_id="b", offset=0, length=length - 4),
        ],
    )
    output = done(client.model.forward([marked], "cross_entropy"))
    close(logprobs_of(output), model_logprobs(client.model))


@operation("forward_backward_custom")
def custom_loss(client: Client) -> None:
    def squared(data, logprobs):
        loss = sum(((-values) ** 2).sum() for values in logprobs)
        return loss, {"squared": float(loss)}

    model, before = new_model(client), client.untrained
    output = done(model.forward_backward_custom([datum(), datum()], squared))
    close(output.metrics["squared"], 2 * (before**2).sum(), 1e-2)
    close(logprobs_of(output, 1), before)
    done(model.optim_step(types.AdamParams(learning_rate=0.01)))
    assert (model_logprobs(model) ** 2).sum() < (before**2).sum()


@operation("create_custom_loss")
def custom_loss_handle(client: Client) -> None:
    def weighted(logprobs, weights):
        loss = -(logprobs * weights).sum()
        return loss, {"custom/weighted:sum": loss}

    create = needs(client.service, "create_custom_loss")
    handle = done(create(weighted, {"logprobs": 1, "weights": 1}))
    model, before = new_model(client), client.untrained
    output = done(model.forward_backward_custom([datum()], handle))
    close(output.metrics["loss:sum"], -before.sum(), 1e-3)
    close(output.metrics["custom/weighted:sum"], -before.sum(), 1e-3)
    done(model.optim_step(types.AdamParams(learning_rate=0.01)))
    assert model_logprobs(model).sum() > before.sum()


@operation("AdamParams beta1, beta2, eps")
def adam_fields(client: Client) -> None:
    before = model_logprobs(client.model)
    step(client.model, learning_rate=0.02, beta1=0.5, beta2=0.9, eps=1e9)
    close(model_logprobs(client.model), before)
    step(client.model, learning_rate=0.02, beta1=0.5, beta2=0.9, eps=1e-8)
    differs(model_logprobs(client.model), before)


@operation("AdamParams.grad_clip_norm")
def grad_clip_norm(client: Client) -> None:
    needs_adam_field("grad_clip_norm")
    model = new_model(client)
    step(model, learning_rate=0.02, eps=1e-3, grad_clip_norm=1e-9)
    close(model_logprobs(model), client.untrained)
    step(model, learning_rate=0.02, eps=1e-3, grad_clip_norm=10.0)
    differs(model_logprobs(model), client.untrained)


@operation("AdamParams.weight_decay")
def weight_decay(client: Client) -> None:
    needs_adam_field("weight_decay")
    model = new_model(client)
    step(model)
    differs(model_logprobs(model), client.untrained)
    nothing = datum(weights=np.zeros(len(SEQUENCE) - 1, np.float32))
    done(model.forward_backward([nothing], "cross_entropy"))
    done(model.optim_step(types.AdamParams(learning_rate=0.01, beta1=0.0, weight_decay=100.0)))
    close(model_logprobs(model), client.untrained)


@operation("chunked batch")
def chunked_batch(client: Client) -> None:
    kinds = [tokens(3, seed) for seed in range(7)]
    data = [datum(kinds[i % 7]) for i in range(NUM_DATUMS)]
    expected = [model_logprobs(client.model, kind) for kind in kinds]
    output = done(client.model.forward_backward(data, "cross_entropy"))
    assert len(output.loss_fn_outputs) == NUM_DATUMS
    for i in range(NUM_DATUMS):
        close(logprobs_of(output, i), expected[i % 7])
    total = sum(expected[i % 7].sum() for i in range(NUM_DATUMS))
    close(output.metrics["loss:sum"], -total, 0.5)
    before = model_logprobs(client.model)
    done(client.model.optim_step(types.AdamParams(learning_rate=0.01)))
    differs(model_logprobs(client.model), before)


@operation("refused pass")
def refused_pass(client: Client) -> None:
    """A bad request fails in its own result, readably, and the next one works."""
    before = model_logprobs(client.model)
    far = 10**6
    refused(lambda: done(client.model.forward_backward([datum([5, far, 7])], "cross_entropy")), str(far))
    close(model_logprobs(client.model), before)


@operation("refused model")
def refused_model(client: Client) -> None:
    refused(lambda: new_model(client, base_model="nobody/no-such-model"), "no-such-model")
    assert new_model(client).model_id != client.model_id
