"""Write the seeds of the fuzzers: `python -m tests.fuzz.make_corpus`. The same code always writes the same files."""

from __future__ import annotations

import gzip
import json
import shutil

import zstandard

from tests.fuzz.run import CORPUS
from tests.fuzz.targets import readers
from tests.hostile.examples import BODIES
from tinker_server.wire.proto import tinker_server_wire_pb2 as pb

_INT64 = (4).to_bytes(8, "little") + (5).to_bytes(8, "little")
_SHARED = ("create_session", "create_model", "asample", "forward", "optim_step", "load_weights", "save_weights")


def passes() -> list[bytes]:
    """Protobuf passes: dense, sparse, with images and with everything else that the schema has."""
    dense = pb.ForwardBackwardRequest(model_id="s:train:0", seq_id=1, loss_fn="cross_entropy")
    datum = dense.data.add()
    datum.model_input.add().encoded_text.tokens = bytes(8)
    tensor = datum.loss_fn_inputs["target_tokens"]
    tensor.dense, tensor.dtype = _INT64, pb.DTYPE_INT64
    tensor.shape.extend([2])
    weights = datum.loss_fn_inputs["weights"]
    weights.dense, weights.dtype = bytes(8), pb.DTYPE_FLOAT32

    sparse = pb.ForwardBackwardRequest(model_id="m", seq_id=2, loss_fn="cross_entropy", forward_only=True)
    cells = sparse.data.add().loss_fn_inputs["target_tokens"]
    cells.dtype = pb.DTYPE_INT64
    cells.shape.extend([2, 3])
    cells.sparse_csr.values = _INT64
    cells.sparse_csr.crow_indices = b"".join(number.to_bytes(8, "little") for number in (0, 1, 2))
    cells.sparse_csr.col_indices = bytes(8) + (2).to_bytes(8, "little")

    rich = pb.ForwardBackwardRequest(model_id="m", seq_id=3, loss_fn="ppo")
    rich.loss_fn_config["clip"] = 0.2
    rich.loss_fn_config_v2["x"].text = "t"
    rich.loss_fn_config_v2["y"].number = 1.5
    item = rich.data.add()
    image = item.model_input.add().image
    image.data, image.format, image.expected_tokens = b"\x89PNG", "png", 3
    item.model_input.add().dmel.dmel = bytes(4)
    span = item.model_input_spans.add().prompt_tokens
    span.sequence_id, span.offset, span.length = "q:0", 1, 2
    item.loss_fn_input_spans.add().sampled_tokens.sequence_id = "q:1"
    return [message.SerializeToString(deterministic=True) for message in (dense, sparse, rich)]


def packed() -> list[bytes]:
    """Bodies in each content encoding; the first byte is what `tests.fuzz.targets.unpack` chooses by."""
    text = json.dumps(BODIES["create_session"][0]).encode() * 3
    sized = zstandard.ZstdCompressor().compress(text)
    unsized = zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compress(text)
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(5_000_000))
    squeezed = gzip.compress(text, mtime=0)
    swollen = gzip.compress(bytes(2_000_000), mtime=0)
    zstd = [b"\0" + data for data in (sized, unsized, bomb, sized + sized, sized[:-4])]
    return [*zstd, *(b"\1" + data for data in (squeezed, swollen, squeezed + squeezed, squeezed[:-4])), b"\2" + text]


def json_seeds() -> list[bytes]:
    """Each reader with some of its routes' bodies."""
    seeds = []
    for index, name in enumerate(sorted(readers())):
        wanted = name.split(".")[1].removeprefix("read_")
        bodies = BODIES.get(wanted) or BODIES.get(wanted.replace("_backward", "")) or [{"session_id": "s"}]
        seeds += [bytes([index]) + json.dumps(body).encode() for body in bodies]
    shared = [json.dumps(BODIES[name][0]).encode() for name in _SHARED]
    odd = [b'{"a": NaN, "b": [Infinity, -Infinity]}', b'{"seq_id": 18446744073709551615, "model_id": "\\ud800"}']
    return seeds + [bytes([index]) + body for index, body in enumerate(shared + odd)]


def route_seeds() -> list[bytes]:
    """Every body once, at some route: the fuzzer moves it to others. And paths with nasty names."""
    bodies = [json.dumps(body).encode() for name in sorted(BODIES) for body in BODIES[name]]
    plain = [bytes([index, 1, 0, 1, 0]) + body for index, body in enumerate(bodies)]
    nasty = [bytes([index * 4, 0, 40 + index, 1, index]) for index in range(16)]
    return plain + nasty + [bytes([index, 1, 0, 2, 0]) + data for index, data in enumerate(passes())]


def main() -> None:
    """Replace all seeds."""
    seeds = {"proto": passes(), "unpack": packed(), "json": json_seeds(), "routes": route_seeds()}
    for name, inputs in seeds.items():
        shutil.rmtree(CORPUS / name, ignore_errors=True)
        (CORPUS / name).mkdir(parents=True)
        for index, data in enumerate(inputs):
            (CORPUS / name / f"{index:03d}").write_bytes(data)


if __name__ == "__main__":
    main()
