"""The API as plain requests over the SDK's own transport, for measuring the server and not the SDK."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import orjson
import pyqwest

from tinker_server.wire.proto import tinker_server_wire_pb2 as wire

PROTOBUF = "application/x-protobuf"
JSON = "application/json"
PENDING = 408


def pass_body(model_id: str, seq_id: int, num_tokens: int = 8) -> bytes:
    """A forward_backward of one datum, as the SDK encodes it."""
    request = wire.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id, loss_fn="cross_entropy")
    datum = request.data.add()
    tokens = np.arange(3, 3 + num_tokens)
    datum.model_input.add().encoded_text.tokens = tokens.astype("<i4").tobytes()
    for name, values in (("target_tokens", tokens.astype("<i8")), ("weights", np.ones(num_tokens, "<f4"))):
        tensor = datum.loss_fn_inputs[name]
        tensor.dense = values.tobytes()
        tensor.dtype = wire.DTYPE_INT64 if values.dtype == np.int64 else wire.DTYPE_FLOAT32
        tensor.shape.append(num_tokens)
    return request.SerializeToString()


@attrs.define
class RawClient:
    """One connection pool to one server."""

    url: str
    _http: pyqwest.Client = attrs.field(factory=lambda: pyqwest.Client(pyqwest.HTTPTransport()))

    async def post(self, path: str, content: bytes, content_type: str = JSON, accept: str = JSON) -> tuple[int, bytes]:
        """Status and body of one request."""
        headers = {"content-type": content_type, "accept": accept, "x-api-key": "tml-benchmark"}
        answer = await self._http.post(f"{self.url}/api/v1/{path}", headers, content)
        return answer.status, answer.content

    async def call(self, path: str, body: object) -> Any:
        """The JSON answer to a JSON body; a `RuntimeError` when it is an error."""
        status, content = await self.post(path, orjson.dumps(body))
        if status != 200:
            raise RuntimeError(f"{path}: {status} {content[:300]!r}")
        return orjson.loads(content)

    async def submit(self, path: str, content: bytes, content_type: str = JSON) -> str:
        """The id of a request whose answer is a future."""
        status, answer = await self.post(path, content, content_type)
        if status != 200:
            raise RuntimeError(f"{path}: {status} {answer[:300]!r}")
        return str(orjson.loads(answer)["request_id"])

    async def retrieve(self, request_id: str) -> bytes:
        """The result of a request, however often it has to be asked for."""
        body = orjson.dumps({"request_id": request_id, "allow_metadata_only": True})
        while True:
            status, content = await self.post("retrieve_future", body, accept=PROTOBUF)
            if status == PENDING:
                continue
            if status != 200 or content.startswith(b'{"error"'):
                raise RuntimeError(f"retrieve_future: {status} {content[:300]!r}")
            return content

    async def new_model(self) -> str:
        """A session with one model."""
        session = (await self.call("create_session", {"tags": [], "sdk_version": "0"}))["session_id"]
        body = {"session_id": session, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 4}}
        await self.retrieve(await self.submit("create_model", orjson.dumps(body)))
        return f"{session}:train:0"

    async def new_sampler(self) -> str:
        """A session with one sampling session on the base model."""
        session = (await self.call("create_session", {"tags": [], "sdk_version": "0"}))["session_id"]
        body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
        return str((await self.call("create_sampling_session", body))["sampling_session_id"])
