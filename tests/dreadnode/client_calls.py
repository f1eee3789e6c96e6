"""Runs in the environment of the dreadnode client: makes calls of its SDK and prints what each gave, as JSON.

Standard input is a JSON list of ``{"method", "positional", "arguments", "request"?}``. A request of ``{"model",
"fields"}`` is made into the client's own record of that name, which checks it; one without ``model`` is sent as it is.
Each answer is ``{"result"}`` or ``{"error", "message"}``.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from dreadnode.app.api import models
from dreadnode.app.api.client import ApiClient


def main() -> None:
    organization, workspace = os.environ["DREADNODE_ORGANIZATION"], os.environ["DREADNODE_WORKSPACE"]
    client = ApiClient(os.environ["DREADNODE_SERVER"], api_key=os.environ["DREADNODE_API_KEY"])
    answers = [call(client, (organization, workspace), one) for one in json.load(sys.stdin)]
    json.dump(answers, sys.stdout)


def call(client: ApiClient, scope: tuple[str, str], wanted: dict[str, Any]) -> dict[str, Any]:
    try:
        method = getattr(client, wanted["method"])
        places = () if wanted["method"] == "get_training_catalog" else scope
        result = method(*places, *wanted.get("positional", []), *make(wanted), **wanted.get("arguments", {}))
        return {"result": result.model_dump(mode="json")}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


def make(wanted: dict[str, Any]) -> list[Any]:
    request = wanted.get("request")
    if request is None:
        return []
    return [getattr(models, request["model"])(**request["fields"]) if "model" in request else request["fields"]]


if __name__ == "__main__":
    main()
