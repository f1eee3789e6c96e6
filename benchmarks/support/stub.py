"""A server that answers every call at once with fixed bytes: what the SDK itself costs, and nothing else.

Run as a script it serves on a free port and prints ``stub ready on URL``.
"""

from __future__ import annotations

import socket
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tinker_server.wire.proto import tinker_server_wire_pb2 as wire


def canned_pass(num_data: int, num_tokens: int) -> bytes:
    """The encoded result of a pass over ``num_data`` data of ``num_tokens`` tokens."""
    output = wire.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", metrics={"loss:sum": 1.0})
    record = output.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=num_data)
    size = 4 * num_tokens
    field = record.fields["logprobs"]
    field.data = b"\0" * (size * num_data)
    field.offsets = b"".join((size * i).to_bytes(8, "little") for i in range(num_data + 1))
    field.dtype = wire.DTYPE_FLOAT32
    return output.SerializeToString()


async def answer(request: Request) -> Response:
    """One answer for each endpoint of the supervised loop."""
    name = request.url.path.rsplit("/", 1)[-1]
    if name == "forward_backward":
        return JSONResponse({"request_id": "pass"})
    body = await request.json()
    if name == "create_session":
        return JSONResponse({"type": "create_session", "session_id": "s"})
    if name == "get_info":
        model = {"arch": "llama", "model_name": "stub"}
        return JSONResponse({"model_id": body["model_id"], "model_data": model, "is_lora": True, "lora_rank": 8})
    if name in ("create_model", "optim_step"):
        return JSONResponse({"request_id": name})
    if name == "telemetry":
        return JSONResponse({"status": "accepted"})
    if name == "retrieve_future":
        return _result(body["request_id"])
    return JSONResponse({})


def _result(request_id: str) -> Response:
    if request_id == "pass":
        return Response(PASS, media_type="application/x-protobuf")
    if request_id == "optim_step":
        return JSONResponse({"metrics": {"grad_norm": 1.0}})
    return JSONResponse({"model_id": "s:train:0"})


PASS = canned_pass(4, 32)
app = Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])


def main() -> None:
    """Serve until terminated."""
    listener = socket.create_server(("127.0.0.1", 0))
    sys.stderr.write(f"stub ready on http://127.0.0.1:{listener.getsockname()[1]}\n")
    config = uvicorn.Config(app, log_level="warning", timeout_keep_alive=120)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
