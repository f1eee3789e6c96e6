"""What another process does with a sampling client. Imports the SDK only, so that it starts quickly."""

from __future__ import annotations

from typing import Any

import tinker
from tinker import types

PROMPT = [3, 4, 5]


def sample_elsewhere(client: tinker.SamplingClient | str, answers: Any) -> None:
    """Sample with a client, or with the handle of one; answers with the tokens and the clone's number."""
    if isinstance(client, str):
        client = tinker.SamplingClient.from_sampler_handle(client, api_key="tml-dummy")
    params = types.SamplingParams(max_tokens=3, seed=1)
    futures = [client.sample(types.ModelInput.from_ints(PROMPT), 1, params) for _ in range(5)]
    answers.put(([future.result().sequences[0].tokens for future in futures], client._cloned_sampler_id))
    # What answers while the interpreter ends would end it with SIGABRT: pyqwest's threads cannot be stopped in Python.
    client.holder.run_coroutine_threadsafe(client.holder.aclose()).result()
