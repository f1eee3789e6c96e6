"""For every route, requests as a good client sends them: what hostile ones are made from.

Texts in capital letters with a ``$`` stand for ids that exist; `fill` puts them in.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
from typing import Any

import attrs
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Route

from tests.hostile.asgi import Hosted

TEXT = {"chunks": [{"type": "encoded_text", "tokens": [3, 4, 5]}]}
TENSOR = {"data": [4, 5, 6], "dtype": "int64", "shape": [3]}
SPARSE = {
    "data": [1.0, 2.0],
    "dtype": "float32",
    "shape": [3, 4],
    "sparse_crow_indices": [0, 1, 1, 2],
    "sparse_col_indices": [0, 3],
}
DATUM = {
    "model_input": TEXT,
    "loss_fn_inputs": {"target_tokens": TENSOR, "weights": {"data": [1.0, 0.5, 0], "dtype": "float32"}},
    "model_input_spans": [{"type": "prompt_tokens", "sequence_id": "q:0", "offset": 0, "length": 3}],
}
SPARSE_DATUM = {"model_input": TEXT, "loss_fn_inputs": {"target_tokens": {**SPARSE, "dtype": "int64", "data": [1, 2]}}}
IMAGES = {
    "chunks": [
        {"type": "image", "data": base64.b64encode(b"\x89PNG").decode(), "format": "png", "expected_tokens": 4},
        {"type": "image_asset_pointer", "format": "png", "location": "s3://x"},
        {"type": "dmel", "dmel": base64.b64encode(bytes(8)).decode()},
    ]
}
PARAMS = {"max_tokens": 3, "seed": 1, "stop": [1], "temperature": 0.5, "top_k": -1, "top_p": 1.0}
SAMPLE = {
    "type": "sample",
    "sampling_session_id": "$SAMPLER",
    "seq_id": 0,
    "num_samples": 2,
    "prompt": TEXT,
    "sampling_params": PARAMS,
    "prompt_logprobs": True,
    "topk_prompt_logprobs": 0,
    "prompt_alt_tokens_k": 0,
    "prompt_logprobs_last_n": 1,
    "record_stability_info": False,
}
ADAM = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "learning_rate": 1e-3, "weight_decay": 0.0, "grad_clip_norm": 1.0}
LORA = {"rank": 2, "seed": 7, "train_attn": True, "train_mlp": True, "train_unembed": False}
OPTIMIZER = {"type": "adamw"}
METADATA = {"k": "v", "tinker_server.lora_alpha": "16", "tinker_server.target_modules": "q_proj,v_proj"}


def _pass(wrapper: str) -> dict[str, Any]:
    wrapped = {"loss_fn": "cross_entropy", "loss_fn_config": {"clip": 0.2, "x": "t"}, "data": [DATUM, SPARSE_DATUM]}
    return {"model_id": "$MODEL", "seq_id": 1, wrapper: wrapped}


_NEW_MODEL = {"session_id": "$SESSION", "model_seq_id": 3, "base_model": "tiny"}
_NEXT = {"model_id": "$MODEL", "seq_id": 2}
_PATH = {"tinker_path": "$CHECKPOINT"}

_NODES = [
    {"op": "placeholder", "name": "logprobs", "target": "logprobs", "args": [], "kwargs": {}},
    {"op": "call_method", "name": "sum_1", "target": "sum", "args": [{"ref": "logprobs"}], "kwargs": {"dim": 0}},
    {"op": "call_function", "name": "neg", "target": "operator.neg", "args": [{"ref": "sum_1"}], "kwargs": {}},
    {
        "op": "output",
        "name": "output",
        "target": "output",
        "args": [{"tuple": [{"ref": "neg"}, {"dict": {"custom/x:sum": {"ref": "neg"}}}]}],
        "kwargs": {},
    },
]
_DATASET = {"name": "gsm8k", "version": "1.0.0"}
_RECIPE = {"name": "contains_v1", "params": {"needle": "x"}}

BODIES: dict[str, list[dict[str, Any]]] = {
    "client/config": [{"sdk_version": "0.38.0"}],
    "client/dynamic_config": [{"sdk_version": "0.38.0"}],
    "auth/token": [{}],
    "/agreement": [{}],
    "create_session": [
        {
            "type": "create_session",
            "tags": ["a"],
            "sdk_version": "0",
            "project_id": "p",
            "display_name": "n",
            "user_metadata": METADATA,
        }
    ],
    "session_heartbeat": [{"session_id": "$SESSION", "type": "session_heartbeat"}],
    "telemetry": [{"events": [{"event": "SESSION_START", "event_id": "e", "severity": "INFO"}], "session_id": "s"}],
    "audit": [{"event_type": "create_session", "limit": 10}],
    "create_model": [{**_NEW_MODEL, "lora_config": LORA, "optimizer_config": OPTIMIZER, "user_metadata": METADATA}],
    "get_info": [{"model_id": "$MODEL"}],
    "unload_model": [{"model_id": "$SPARE_MODEL", "type": "unload_model"}],
    "forward_backward": [_pass("forward_backward_input")],
    "forward": [_pass("forward_input")],
    "optim_step": [{**_NEXT, "adam_params": ADAM}, {**_NEXT, "optimizer_params": {"type": "muon", "lr": 0.1}}],
    "create_custom_loss": [
        {
            "session_id": "$SESSION",
            "custom_loss_seq_id": 1,
            "name": "n",
            "inputs": [{"name": "logprobs", "rank": 1}],
            "graph": {"format": 1, "nodes": _NODES},
        }
    ],
    "retrieve_future": [{"request_id": "$REQUEST", "allow_metadata_only": True}],
    "retrieve_futures": [
        {
            "target": {"type": "sampling_session", "sampling_session_id": "$SAMPLER", "cloned_sampler_id": 0},
            "prev_cursor": 0,
            "timeout": 0.01,
            "retrieved_request_ids": ["$REQUEST"],
        }
    ],
    "cancel_future": [{"request_id": "$REQUEST"}],
    "create_sampling_session": [
        {"session_id": "$SESSION", "sampling_session_seq_id": 5, "base_model": "tiny"},
        {"session_id": "$SESSION", "sampling_session_seq_id": 6, "model_path": "$SAVED"},
    ],
    "join_sampling_session": [{"sampling_session_id": "$SAMPLER", "session_id": "$SESSION", "cloned_sampler_id": 1}],
    "asample": [
        SAMPLE,
        {**SAMPLE, "prompt": IMAGES},
        {**SAMPLE, "target_prompt_logprobs": {**TENSOR, "shape": [3, 1]}},
    ],
    "save_weights": [{**_NEXT, "path": "w1", "ttl_seconds": 3600, "overwrite": True, "user_metadata": METADATA}],
    "save_weights_for_sampler": [
        {**_NEXT, "path": "s1", "kind": "snapshot", "ttl_seconds": None},
        {**_NEXT, "sampling_session_seq_id": 9, "kind": "inflight"},
    ],
    "save_weights_external": [
        {**_NEXT, "path": "e1", "ttl_seconds": 60, "age_recipients": ["age1xyz"], "encryption": {"type": "age"}}
    ],
    "load_weights": [
        {**_NEXT, "path": "$CHECKPOINT", "optimizer": True},
        {"session_id": "$SESSION", "model_seq_id": 8, "path": "$CHECKPOINT", "optimizer": False, "user_metadata": {}},
        {"session_id": "$SESSION", "model_seq_id": 9, "path": "$CHECKPOINT", "weights_access_token": "token"},
    ],
    "weights_info": [_PATH],
    "copy_weights": [{"source": "$CHECKPOINT", "path": "c1", "tinker_path": "$CHECKPOINT", "overwrite": False}],
    "sessions/{session_id}/finish": [{"reason": {"type": "errored"}, "detail": "boom"}],
    "sessions/search": [{"query": "x", "limit": 10, "tags": ["a"], "cursor": None}],
    "ttl": [{"ttl_seconds": 3600}],
    "publish": [{}],
    "project": [{"project_id": "p"}],
    "training/jobs": [
        {
            "name": "n",
            "model": "local/tiny",
            "capability_ref": {"name": "helper", "version": "1.0.0"},
            "tags": ["a"],
            "backend": backend,
            "trainer_type": trainer_type,
            "config": {**config, "batch_size": 2, "learning_rate": 1e-4, "checkpoint_interval": 3},
        }
        for backend, trainer_type, config in (
            ("tinker", "sft", {"dataset_ref": _DATASET, "trajectory_dataset_refs": [_DATASET]}),
            ("tinker", "rl", {"algorithm": "ppo", "prompt_dataset_ref": _DATASET, "reward_recipe": _RECIPE}),
            (
                "tinker",
                "rl",
                {"algorithm": "ppo", "world_manifest_id": "lab", "world_reward": {"name": "goal_only_v1"}},
            ),
            ("ray", "rl", {"task_ref": "my-task@1.0.0", "prompt_dataset_ref": _DATASET, "reward_recipe": _RECIPE}),
        )
    ],
    "cancel": [{}],
    "retry": [{}],
    "progress": [
        {"event_type": "training_start", "message": "m", "level": "info", "data": {"a": 1}},
        {"event_type": "step_complete", "metrics": {"steps": [1], "train/loss": [2.0], "train/loss_last": 2.0}},
        {"event_type": "checkpoint_saved", "artifacts": {"latest_checkpoint": "tinker://x"}},
        {"event_type": "eval_complete", "metrics": {"eval/steps": [1], "eval/loss": [2.0]}},
    ],
    "{path:path}": [{"path": "$CHECKPOINT", "limit": 10, "name": "n", "ttl_seconds": 60, "model_id": "$MODEL"}],
}
"""Bodies by the end of the route's path; the entry with the longest fitting end counts."""

PARAMETERS: dict[str, list[str]] = {
    "session_id": ["$SESSION"],
    "run_id": ["$MODEL"],
    "model_id": ["$MODEL"],
    "training_run_id": ["$MODEL"],
    "sampling_session_id": ["$SAMPLER"],
    "checkpoint_id": ["weights/w0", "sampler_weights/s0"],
    "request_id": ["$REQUEST"],
    "kind": ["weights", "sampler_weights"],
    "name": ["w0", "s0"],
    "file": ["tinker.json", "weights.npz"],
    "path": ["weights/w0"],
    "tinker_path": ["$CHECKPOINT"],
    "organization": ["local"],
    "workspace": ["default"],
    "project": ["p"],
    "job_id": ["$JOB"],
}
"""Good values of path parameters by name."""

QUERY_KEYS = (
    "limit",
    "offset",
    "project_id",
    "cursor",
    "expires",
    "signature",
    "from",
    "to",
    "start",
    "group_by",
    "base_model",
)

_SEQ_IDS = itertools.count(10)


@attrs.frozen(kw_only=True)
class Endpoint:
    """One route."""

    path: str
    """As Starlette has it: ``/a/{b}/c/{d:path}``."""
    methods: tuple[str, ...]

    @property
    def takes_body(self) -> bool:
        return bool({"POST", "PUT", "PATCH"} & set(self.methods))

    @property
    def parameters(self) -> list[str]:
        """Names of path parameters."""
        return re.findall(r"{(\w+)", self.path)

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """Good bodies; `LookupError` when nobody has written any."""
        ends = [end for end in BODIES if self.path.endswith(end)]
        if not ends:
            raise LookupError(f"{self} is new: give tests/hostile/examples.py a body for it")
        return BODIES[max(ends, key=len)]

    def __str__(self) -> str:
        return f"{'|'.join(self.methods)} {self.path}"


def endpoints(app: Starlette) -> list[Endpoint]:
    """All routes of an app."""
    return [_endpoint(route) for route in app.routes]


def _endpoint(route: BaseRoute) -> Endpoint:
    assert isinstance(route, Route), f"teach this module to attack {route!r}"
    return Endpoint(path=route.path, methods=tuple(sorted(route.methods or ())))


def fill(text: str, ids: dict[str, str]) -> str:
    """Put ids that exist in the places of their names."""
    for name in sorted(ids, key=len, reverse=True):
        text = text.replace(f"${name}", ids[name])
    return text


def prepare(hosted: Hosted) -> dict[str, str]:
    """Make one of everything; ids by name."""
    session = hosted.post("create_session", {}).json()["session_id"]
    models = []
    for number in range(2):
        new = {"session_id": session, "model_seq_id": number, "base_model": "tiny", "lora_config": LORA}
        models.append(hosted.result("create_model", new)["model_id"])
    request = hosted.post("forward", {"model_id": models[0], "seq_id": 1, "forward_input": _pass("x")["x"]})
    saved = hosted.result("save_weights", {"model_id": models[0], "seq_id": 2, "path": "w0"})["path"]
    for_sampler = hosted.result("save_weights_for_sampler", {"model_id": models[0], "seq_id": 3, "path": "s0"})["path"]
    opened = {"session_id": session, "sampling_session_seq_id": 0, "model_path": for_sampler}
    return {
        "SESSION": session,
        "MODEL": models[0],
        "SPARE_MODEL": models[1],
        "REQUEST": request.json()["request_id"],
        "CHECKPOINT": saved,
        "SAVED": for_sampler,
        "SAMPLER": hosted.post("create_sampling_session", opened).json()["sampling_session_id"],
    }


def body_json(endpoint: Endpoint, index: int, ids: dict[str, str]) -> Any:
    """One of a route's good bodies."""
    bodies = endpoint.bodies
    body = json.loads(fill(json.dumps(bodies[index % len(bodies)]), ids))
    if "seq_id" in body:
        body["seq_id"] = next(_SEQ_IDS)  # a repeated number would only bring the first one's receipt
    return body
