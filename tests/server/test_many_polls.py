"""Hundreds of long polls at once, over the SDK's own transport: they wait, others are served, and all are answered."""

from __future__ import annotations

import asyncio
from pathlib import Path

import orjson
import pyqwest

from tests.server.conftest import Api, open_api
from tests.server.test_routes import pass_body

NUM_MODELS, PER_MODEL = 4, 100
PENDING = 408


def test_hundreds_of_polls_wait_while_others_are_served(tmp_path: Path) -> None:
    with open_api(tmp_path, poll_seconds=30.0) as api:
        session = api.session()
        models = [api.model(session, number) for number in range(NUM_MODELS)]
        assert asyncio.run(poll_everything(api, models)) == NUM_MODELS * PER_MODEL


async def poll_everything(api: Api, models: list[str]) -> int:
    """Polls of passes whose predecessor is still to come, and then that; the number of results."""
    http = pyqwest.Client(pyqwest.HTTPTransport())
    headers = {"content-type": "application/json"}

    async def post(path: str, body: object) -> pyqwest.FullResponse:
        return await http.post(f"{api.url}/api/v1/{path}", headers, orjson.dumps(body))

    async def submit(model_id: str, seq_id: int) -> str:
        answer = await post("forward_backward", pass_body(model_id, seq_id))
        assert answer.status == 200, answer.content
        return str(answer.json()["request_id"])

    async def poll(request_id: str) -> pyqwest.FullResponse:
        while (answer := await post("retrieve_future", {"request_id": request_id})).status == PENDING:
            pass
        return answer

    later = [(model_id, seq_id) for model_id in models for seq_id in range(2, 2 + PER_MODEL)]
    request_ids = await asyncio.gather(*(submit(*each) for each in later))
    polls = [asyncio.create_task(poll(request_id)) for request_id in request_ids]
    while f"tinker_open_polls {len(polls)}.0" not in (await http.get(f"{api.url}/metrics")).text():
        pass  # each round is a request
    assert (await post("session_heartbeat", {"session_id": models[0].partition(":")[0]})).status == 200
    assert not any(each.done() for each in polls)
    await asyncio.gather(*(submit(model_id, 1) for model_id in models))
    results = await asyncio.gather(*polls)
    return sum("loss:sum" in result.json()["metrics"] for result in results)
