"""create_custom_loss: a traced loss, read as data. What it may contain is for the engine to say."""

from __future__ import annotations

from tinker_core.errors import InvalidCustomLossError, InvalidRequestError, TinkerError
from tinker_core.types import (
    CreateCustomLossInput,
    CustomLoss,
    CustomLossInput,
    CustomLossNode,
    CustomLossOp,
    RequestType,
)
from tinker_server.wire.body import Body
from tinker_server.wire.fields import Fields, as_object, show
from tinker_server.wire.rejected import RejectedRequest, reject

_FORMAT = 1


def read_create_custom_loss(body: Body) -> CreateCustomLossInput | RejectedRequest:
    """A custom loss of a session."""
    fields = Fields(body.json_object(), "")
    session_id, seq_id = fields.text("session_id"), fields.integer("custom_loss_seq_id")
    if seq_id < 0:
        raise InvalidRequestError(f"custom_loss_seq_id must not be negative, got {seq_id}")
    try:
        graph = Fields(fields.mapping("graph"), "graph")
        loss = CustomLoss(
            name=fields.text("name"),
            inputs=tuple(_input(index, item) for index, item in enumerate(fields.objects("inputs"))),
            nodes=tuple(_node(index, item) for index, item in enumerate(graph.objects("nodes"))),
        )
        if graph.integer("format", _FORMAT) != _FORMAT:
            raise InvalidCustomLossError(f"graph.format must be {_FORMAT}, the only one that is known")
        graph.refuse_unknown()
        fields.log_unknown()
    except TinkerError as error:
        return reject(session_id, seq_id, RequestType.CREATE_CUSTOM_LOSS, error)
    return CreateCustomLossInput(session_id=session_id, custom_loss_seq_id=seq_id, loss=loss)


def _input(index: int, item: object) -> CustomLossInput:
    fields = as_object(item, f"inputs[{index}]")
    read = CustomLossInput(name=fields.text("name"), rank=fields.integer("rank"))
    fields.refuse_unknown()
    return read


def _node(index: int, item: object) -> CustomLossNode:
    fields = as_object(item, f"graph.nodes[{index}]")
    op = fields.text("op")
    if op not in list(CustomLossOp):
        raise InvalidCustomLossError(f"graph.nodes[{index}].op is {show(op)}; known are {', '.join(CustomLossOp)}")
    read = CustomLossNode(
        op=CustomLossOp(op),
        name=fields.text("name"),
        target=fields.text("target"),
        args=tuple(fields.objects("args", [])),
        kwargs=fields.mapping("kwargs", None) or {},
    )
    fields.refuse_unknown()
    return read
