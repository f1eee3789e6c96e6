"""Traced losses give the same numbers here as in the client; graphs that mean harm do none."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from tests.custom_losses.tracing import trace
from tinker_core.custom_losses import vocabulary
from tinker_core.custom_losses.check import MAX_NODES, check_custom_loss
from tinker_core.encoding import Encoder
from tinker_core.errors import InvalidCustomLossError
from tinker_core.testing.graph_builder import GraphBuilder, Ref, clipped_policy_loss
from tinker_core.training.graphs import operations
from tinker_core.training.graphs.program import Program
from tinker_core.types import CustomLoss, CustomLossNode, CustomLossOp

LENGTH, WIDTH = 7, 3


def inputs_of(loss: CustomLoss) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {0: (), 1: (LENGTH,), 2: (LENGTH, WIDTH)}
    found = [torch.randn(shapes[entry.rank], generator=generator) - 1 for entry in loss.inputs]
    for index, entry in enumerate(loss.inputs):
        if entry.name == "ids":
            found[index] = torch.randint(LENGTH, shapes[entry.rank], generator=generator)
    found[0].requires_grad_()
    return found


# --- the same numbers as in the client --------------------------------------------------------------------------------


def policy(logprobs, old, advantages):
    ratio = torch.exp(logprobs - old)
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum()
    return loss, {"custom/ratio:mean": ratio.mean(), "custom/clipped:sum": (ratio > 1.2).float().sum()}


def whole_datum(logprobs, old, advantages):
    distance = logprobs - old
    weights = torch.softmax(advantages / 0.7, dim=0).detach()
    spread = (distance - distance.mean()).square().mean().sqrt()
    return -(weights * logprobs).sum() * math.sqrt(2.0) + spread + torch.logsumexp(logprobs, dim=-1), {}


def shapes_and_indices(logprobs, old, ids):
    steps = logprobs[1:] - logprobs[:-1]
    picked = logprobs[ids] + torch.gather(logprobs, 0, ids) + logprobs.index_select(0, ids)
    chosen = logprobs[old > -1].sum() + torch.where(old > 0, logprobs, torch.zeros_like(logprobs)).sum()
    best, where = torch.topk(logprobs, 2)
    pairs = logprobs[:, None] - logprobs[None, :]
    padded = F.pad(steps, (0, 1)).reshape(-1, logprobs.shape[0]).expand(2, -1).T.contiguous().view(-1)
    rest = torch.cat([best, logprobs.flip(0)]).cumsum(0).max(dim=0).values + torch.stack([old, logprobs]).amax()
    made = torch.full((logprobs.size(0),), 0.5, device=logprobs.device) + torch.arange(
        logprobs.numel(), dtype=torch.float32
    )
    total = (steps**2).sum() + picked.mean() + chosen + torch.sigmoid(pairs).mean() + padded.sum() + rest
    return total + (made * logprobs.to(torch.float64)).float().sum() / logprobs.ndim, {"custom/first:sum": where[0]}


def functions(logprobs, old):
    loss = F.softplus(-logprobs).sum() + F.huber_loss(logprobs, old, reduction="sum") + F.relu(logprobs).mean()
    loss = loss + F.kl_div(logprobs, old, reduction="sum", log_target=True) + F.logsigmoid(logprobs).sum()
    loss = loss + torch.special.expm1(logprobs).sum() + torch.special.xlogy(torch.exp(old), 2.0).sum()
    loss = loss + torch.linalg.vector_norm(logprobs) + torch.norm(logprobs - old) + F.normalize(logprobs, dim=0)[0]
    loss = loss + F.smooth_l1_loss(logprobs, old) + F.gelu(logprobs).sum() + (logprobs @ old) + torch.dot(old, logprobs)
    return loss + F.log_softmax(logprobs, dim=-1).nan_to_num(posinf=float("inf"))[0] + logprobs.std(), {}


def soft_targets(logprobs, weights, scale):
    picked = (logprobs * weights).sum(-1)
    return -picked.mean() * scale - torch.logsumexp(logprobs, dim=1).sum() + logprobs[:, 0].max(), {}


LOSSES: dict[str, tuple[Callable[..., Any], dict[str, int]]] = {
    "policy": (policy, {"logprobs": 1, "old": 1, "advantages": 1}),
    "whole datum": (whole_datum, {"logprobs": 1, "old": 1, "advantages": 1}),
    "shapes and indices": (shapes_and_indices, {"logprobs": 1, "old": 1, "ids": 1}),
    "functions": (functions, {"logprobs": 1, "old": 1}),
    "soft targets": (soft_targets, {"logprobs": 2, "weights": 2, "scale": 0}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_traced_loss_gives_the_clients_own_numbers(name: str) -> None:
    fn, ranks = LOSSES[name]
    handle, loss = trace(fn, **ranks)
    travelled = Encoder().decode(Encoder().encode(loss, CustomLoss), CustomLoss)
    assert travelled == loss
    inputs = inputs_of(loss)
    expected, expected_metrics = handle.graph(*inputs)
    found, metrics = Program(travelled).run(inputs)
    assert found.item() == expected.item()
    assert metrics == {key: float(value.detach()) for key, value in expected_metrics.items()}
    (slopes,), (expected_slopes,) = (torch.autograd.grad(value, inputs[0]) for value in (found, expected))
    assert torch.equal(slopes, expected_slopes)


def test_the_tables_hold_the_vocabulary_and_nothing_else() -> None:
    assert set(operations.FUNCTIONS) == vocabulary.FUNCTIONS | {vocabulary.GETATTR}
    assert set(operations.METHODS) == vocabulary.METHODS
    assert set(operations.DTYPES) == vocabulary.DTYPES


@pytest.mark.parametrize("word", ["rand", "empty", "backward", "item", "numpy", "set_", "__", "load", "apply"])
def test_no_name_that_could_do_harm_is_in_the_vocabulary(word: str) -> None:
    names = {name.rsplit(".", 1)[-1] for name in vocabulary.FUNCTIONS | vocabulary.METHODS | vocabulary.ATTRIBUTES}
    assert not [name for name in names if name.startswith(word) or (name.endswith("_") and name not in ("and_", "or_"))]


# --- graphs that are refused when they are created --------------------------------------------------------------------

Build = Callable[[GraphBuilder, Ref], Ref]


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth else []


REFUSED: dict[str, Build] = {
    "a function of the system": lambda graph, x: graph.call("os.system", "true"),
    "a builtin": lambda graph, x: graph.call("eval", x),
    "a loader": lambda graph, x: graph.call("torch.load", x),
    "a hub": lambda graph, x: graph.call("torch.hub.load", x),
    "a private function": lambda graph, x: graph.call("torch._C._set_backcompat_broadcast_warn", x),
    "a random function": lambda graph, x: graph.call("torch.rand_like", x),
    "memory as it was": lambda graph, x: graph.call("torch.empty_like", x),
    "a module": lambda graph, x: graph.add(CustomLossOp.CALL_MODULE, "linear", (x,), {}),
    "a captured tensor": lambda graph, x: graph.add(CustomLossOp.GET_ATTR, "_tensor_constant0", (), {}),
    "a second input": lambda graph, x: graph.add(CustomLossOp.PLACEHOLDER, "logprobs", (), {}),
    "a dunder method": lambda graph, x: graph.method("__reduce__", x),
    "a method in place": lambda graph, x: graph.method("add_", x, 1),
    "a method with a callback": lambda graph, x: graph.method("apply_", x),
    "a hidden attribute": lambda graph, x: graph.call("getattr", x, "__class__"),
    "an attribute of any name": lambda graph, x: graph.call("getattr", x, x),
    "an unknown keyword": lambda graph, x: graph.call("torch.exp", x, hook=1),
    "a place to write to": lambda graph, x: graph.call("torch.exp", x, out=x),
    "work in place": lambda graph, x: graph.call("torch.nn.functional.relu", x, inplace=True),
    "a text": lambda graph, x: graph.call("torch.exp", "%1000000000d"),
    "a node that comes later": lambda graph, x: graph.call("torch.exp", {"ref": "node_99"}),
    "itself": lambda graph, x: graph.call("torch.exp", {"ref": "node_1"}),
    "a huge integer": lambda graph, x: graph.call("operator.mul", x, 2**64),
    "an unknown type": lambda graph, x: graph.method("to", x, {"dtype": "complex64"}),
    "an unknown device": lambda graph, x: graph.method("to", x, {"device": "meta"}),
    "an unknown kind of argument": lambda graph, x: graph.call("torch.exp", {"code": "1"}),
    "a dict": lambda graph, x: graph.call("torch.exp", {"dict": {"a": x}}),
    "an object of two keys": lambda graph, x: graph.call("torch.exp", {"ref": "logprobs", "tuple": []}),
    "deep nesting": lambda graph, x: graph.call("torch.stack", nested(50)),
    "too many arguments": lambda graph, x: graph.call("torch.stack", [x] * 5000),
    "something that is no value": lambda graph, x: graph.call("torch.exp", b"bytes"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_graph_that_is_not_allowed_is_refused_with_its_node(what: str) -> None:
    graph = GraphBuilder(logprobs=1)
    made = REFUSED[what](graph, graph["logprobs"])
    loss = graph.returns(graph.method("sum", made))
    with pytest.raises(InvalidCustomLossError, match="node_1"):
        check_custom_loss(loss)
    with pytest.raises(InvalidCustomLossError, match="node_1"):
        Program(loss)


def changed(**changes: Any) -> CustomLoss:
    return attrs.evolve(clipped_policy_loss(), **changes)


def with_output(*args: Any) -> CustomLoss:
    nodes = clipped_policy_loss().nodes
    return changed(nodes=(*nodes[:-1], attrs.evolve(nodes[-1], args=args)))


NODES = clipped_policy_loss().nodes
MALFORMED: dict[str, tuple[CustomLoss, str]] = {
    "no nodes": (changed(nodes=()), "0 nodes"),
    "too many nodes": (changed(nodes=NODES[:3] + NODES[3:4] * MAX_NODES), "nodes"),
    "no inputs": (changed(inputs=()), "inputs"),
    "a rank that does not exist": (
        changed(inputs=(attrs.evolve(clipped_policy_loss().inputs[0], rank=3),)),
        "rank 3",
    ),
    "inputs in another order": (changed(nodes=(NODES[1], NODES[0], *NODES[2:])), "placeholder"),
    "a name twice": (changed(nodes=(*NODES[:4], NODES[3], *NODES[4:])), NODES[3].name),
    "no output": (changed(nodes=NODES[:-1]), "output"),
    "an output in between": (changed(nodes=(*NODES[:4], NODES[-1], *NODES[4:])), "output"),
    "an output of one": (with_output({"ref": "node_3"}), "loss, metrics"),
    "a loss that is a number": (with_output({"tuple": [1.0, {"dict": {}}]}), "the loss"),
    "a loss without logprobs": (with_output({"tuple": [{"ref": "advantages"}, {"dict": {}}]}), "depend on logprobs"),
    "a metric that shadows": (with_output({"tuple": [{"ref": "node_9"}, {"dict": {"loss:sum": 1}}]}), "loss:sum"),
    "a metric that is a number": (with_output({"tuple": [{"ref": "node_9"}, {"dict": {"custom/a:sum": 1}}]}), "result"),
    "an endless name": (changed(name="x" * 1000), "1000"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_graph_is_refused(what: str) -> None:
    loss, expected = MALFORMED[what]
    with pytest.raises(InvalidCustomLossError, match=expected):
        check_custom_loss(loss)


# --- graphs that are refused when they run ----------------------------------------------------------------------------


def grown(graph: GraphBuilder, x: Ref) -> Ref:
    for _ in range(60):
        x = graph.call("torch.cat", [x, x])
    return x


def worked(graph: GraphBuilder, x: Ref) -> Ref:
    x = graph.method("repeat", x, 50_000)
    for _ in range(400):
        x = graph.call("torch.exp", x)
    return x


ONES = {"tuple": [{"slice": [None, None, None]}, None]}
BOMBS: dict[str, Build] = {
    "zeros": lambda graph, x: graph.call("torch.zeros", 10**12),
    "full": lambda graph, x: graph.call("torch.full", {"tuple": [10**6, 10**6]}, 1.0),
    "new zeros": lambda graph, x: graph.method("new_zeros", x, 10**6, 10**6),
    "arange": lambda graph, x: graph.call("torch.arange", 0, 10**12, 1),
    "a fine arange": lambda graph, x: graph.call("torch.arange", 0.0, 1.0, 1e-12),
    "linspace": lambda graph, x: graph.call("torch.linspace", 0, 1, 10**12),
    "eye": lambda graph, x: graph.call("torch.eye", 10**6),
    "repeat": lambda graph, x: graph.method("repeat", x, 10**12),
    "tile": lambda graph, x: graph.method("tile", x, {"tuple": [10**6, 10**6]}),
    "repeat interleave": lambda graph, x: graph.method("repeat_interleave", x, 10**12),
    "repeats out of data": lambda graph, x: graph.method("repeat_interleave", x, x),
    "pad": lambda graph, x: graph.call("torch.nn.functional.pad", x, {"tuple": [0, 10**12]}),
    "expand": lambda graph, x: graph.method("expand", x, 10**12, -1),
    "broadcasting": lambda graph, x: graph.call(
        "operator.mul",
        graph.method("unsqueeze", graph.method("repeat", x, 10**5), 0),
        graph.method("unsqueeze", graph.method("repeat", x, 10**5), 1),
    ),
    "outer": lambda graph, x: graph.call("torch.outer", *[graph.method("repeat", x, 10**5)] * 2),
    "product": lambda graph, x: graph.call(
        "operator.matmul",
        graph.call("operator.getitem", graph.method("repeat", x, 10**4), ONES),
        graph.method("unsqueeze", graph.method("repeat", x, 10**4), 0),
    ),
    "indexing": lambda graph, x: graph.call(
        "operator.getitem",
        graph.method("expand", x, 1000, -1),
        graph.method("long", graph.method("repeat", graph.call("torch.zeros_like", x), 10**5)),
    ),
    "doubling": grown,
    "endless work": worked,
    "powers of integers": lambda graph, x: graph.call("operator.pow", 10**9, 10**9),
    "repeated text": lambda graph, x: graph.call("operator.mul", "sum", 10**9),
    "repeated tuple": lambda graph, x: graph.call("operator.mul", {"tuple": [1]}, 10**9),
    "formatted text": lambda graph, x: graph.call("operator.mod", "sum", 1),
    "a trapping division": lambda graph, x: graph.call("operator.floordiv", *[graph.method("long", x)] * 2),
    "another trapping division": lambda graph, x: graph.call("torch.remainder", graph.method("long", x), -1),
    "an index out of range": lambda graph, x: graph.call(
        "operator.getitem", x, graph.method("long", graph.call("torch.full_like", x, 1000))
    ),
    "gathering out of range": lambda graph, x: graph.call(
        "torch.gather", x, 0, graph.method("long", graph.call("torch.full_like", x, -1))
    ),
    "many axes": lambda graph, x: graph.method("reshape", x, [1] * 50 + [-1]),
    "a flag by its place": lambda graph, x: graph.call("torch.nn.functional.relu", x, True),
    "a place to write to by its place": lambda graph, x: graph.call("torch.norm", x, 2, 0, False, x),
    "a tensor as a number": lambda graph, x: graph.call("math.exp", x),
    "a method of a number": lambda graph, x: graph.method("sum", graph.method("numel", x)),
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_graph_that_would_do_harm_ends_with_an_error_at_its_node(what: str) -> None:
    graph = GraphBuilder(logprobs=1)
    made = BOMBS[what](graph, graph["logprobs"])
    program = Program(graph.returns(graph.call("operator.add", made, graph.method("sum", graph["logprobs"]))))
    with pytest.raises(InvalidCustomLossError, match=r"node 'node_\d+' \("):
        program.run([torch.randn(16, requires_grad=True)])


def random_argument(chance: random.Random, names: list[str]) -> Any:
    numbers = [0, 1, -1, 2, 3, 10**6, 10**12, 0.5, -1.0, None, True]
    others: list[Any] = [
        {"dtype": chance.choice(sorted(vocabulary.DTYPES))},
        [{"ref": chance.choice(names)}, {"ref": chance.choice(names)}],
        {"tuple": [chance.choice([0, 1, -1]), {"ref": chance.choice(names)}]},
        {"slice": [None, chance.choice([0, 1, -1]), None]},
        {"ellipsis": True},
        {"float": "nan"},
        "sum",
    ]
    return chance.choice([{"ref": chance.choice(names)}] * 4 + [chance.choice(numbers)] * 4 + [chance.choice(others)])


@pytest.mark.filterwarnings("ignore")  # torch warns of what random graphs ask of it
@pytest.mark.parametrize("seed", range(3))
def test_random_graphs_run_or_fail_by_name(seed: int) -> None:
    chance = random.Random(seed)
    functions, methods = sorted(vocabulary.FUNCTIONS), sorted(vocabulary.METHODS)
    num_run = 0
    for _ in range(150):
        graph = GraphBuilder(logprobs=1, ids=1, weights=2)
        names = ["logprobs", "ids", "weights"]
        for _ in range(6):
            arguments = [
                {"ref": chance.choice(names)},
                *(random_argument(chance, names) for _ in range(chance.choice([0, 1, 1, 2]))),
            ]
            if chance.random() < 0.5:
                made = graph.call(chance.choice(functions), *arguments)
            else:
                made = graph.method(chance.choice(methods), *arguments)
            inputs = [
                torch.randn(LENGTH, requires_grad=True),
                torch.randint(-3, LENGTH, (LENGTH,)),
                torch.randn(LENGTH, WIDTH),
            ]
            total = [graph.method("sum", made), graph.method("sum", graph["logprobs"])]
            try:
                loss, _ = Program(graph.returns(graph.call("operator.add", *total))).run(inputs)
                with contextlib.suppress(RuntimeError):  # an operation without derivative
                    torch.autograd.grad(loss, inputs[0])
                num_run += 1
                names.append(made["ref"])
            except InvalidCustomLossError:
                graph.nodes = [node for node in graph.nodes if node.name in names]
            else:
                graph.nodes = graph.nodes[:-3]
    assert num_run > 100


def test_what_a_graph_returns_must_be_scalars() -> None:
    graph = GraphBuilder(logprobs=1)
    loss = graph.returns(graph.method("sum", graph["logprobs"]), {"custom/all:sum": graph["logprobs"]})
    with pytest.raises(InvalidCustomLossError, match="custom/all:sum"):
        Program(loss).run([torch.zeros(4)])
    counted = GraphBuilder(logprobs=1)
    with pytest.raises(InvalidCustomLossError, match="int64"):
        Program(counted.returns(counted.method("argmax", counted["logprobs"]))).run([torch.zeros(4)])


def test_an_output_node_of_a_list_is_fine() -> None:
    nodes = clipped_policy_loss().nodes
    pair = nodes[-1].args[0]["tuple"]  # type: ignore[index]
    output = CustomLossNode(op=CustomLossOp.OUTPUT, name="output", target="output", args=(pair,))
    check_custom_loss(changed(nodes=(*nodes[:-1], output)))
