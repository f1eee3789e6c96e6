"""Why a request about jobs is refused, as HTTP answers: ``{"detail": …}``, with a list of mistakes for status 422."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from tinker_jobs.errors import JobRequestError, JobStateError, Mistake
from tinker_jobs.requests import mistakes_of

_Model = TypeVar("_Model", bound=BaseModel)
Endpoint = Callable[[Request], Awaitable[Response]]
MAX_MESSAGE = 2000
"""Most characters of one message; it may quote what a client sent."""
_NUL = b"\\u0000"


def refusing(endpoint: Endpoint) -> Endpoint:
    """An endpoint that answers 422 and 409 where the server itself would answer 400."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except JobRequestError as error:
            return _refuse([_entry(mistake) for mistake in error.mistakes], 422)
        except JobStateError as error:
            return _refuse(str(error), 409)

    return answer


def _entry(mistake: Mistake) -> dict[str, object]:
    text = mistake.msg if len(mistake.msg) <= MAX_MESSAGE else f"{mistake.msg[:MAX_MESSAGE]}…"
    return {"type": mistake.type, "loc": list(mistake.loc), "msg": text}


def _refuse(detail: object, status: int) -> Response:
    return Response(orjson.dumps({"detail": detail}), status_code=status, media_type="application/json")


def read_query(model: type[_Model], request: Request) -> _Model:
    """The query as a record; raises `JobRequestError` with all mistakes."""
    try:
        return model.model_validate(dict(request.query_params))
    except ValidationError as error:
        raise JobRequestError(mistakes_of(error, "query")) from error


def read_json(data: bytes) -> dict[str, object]:
    """A body that is a JSON object; raises `JobRequestError`."""
    try:
        value = orjson.loads(data)
        orjson.dumps(value)  # nests no deeper than an answer that repeats it may
    except (orjson.JSONDecodeError, orjson.JSONEncodeError) as error:
        message = f"JSON decode error: {error}"
        raise JobRequestError([Mistake(loc=("body",), msg=message, type="json_invalid")]) from error
    if not isinstance(value, dict):
        message = "Input should be a JSON object"
        raise JobRequestError([Mistake(loc=("body",), msg=message, type="dict_type")])
    if _NUL in data:
        _refuse_nul(value)
    return value


def _refuse_nul(body: dict[str, object]) -> None:
    # No database that jobs are kept in stores it in a text.
    pending: list[tuple[tuple[str | int, ...], object]] = [(("body",), body)]
    while pending:
        loc, value = pending.pop()
        if isinstance(value, dict):
            pending += [((*loc, key), item) for key, item in value.items()]
            pending += [(loc, key) for key in value]
        elif isinstance(value, list):
            pending += [((*loc, index), item) for index, item in enumerate(value)]
        elif isinstance(value, str) and "\0" in value:
            raise JobRequestError([Mistake(loc=loc, msg="text must not contain NUL")])
