"""Plays a job's process for tests of what is around it: does what the tags of the request say, one after the other.

``start``, ``step N LOSS``, ``save N``, ``end``, ``fail TEXT`` report; ``say TEXT`` writes a line that may be no event,
``print TEXT`` writes to standard error; ``wait`` waits to be told to stop, ``gate NAME`` for the test to open a pipe in
the job's directory, ``exit N`` and ``kill`` end it, the latter only in the attempt ``kill N`` names if it names one;
``hang`` ignores everything, ``train`` has the server train a model. A process that goes on begins behind its ``save``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any


class Player:
    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec

    def emit(self, event_type: str, message: str, **fields: Any) -> None:
        self.say(json.dumps({"event_type": event_type, "message": message, **fields}))

    def start(self) -> None:
        data = {
            "attempt": self.spec["attempt"],
            "key": self.spec["api_key"],
            "environment": sorted(os.environ),
            "metrics": self.spec["metrics"],
            "pid": os.getpid(),
        }
        self.emit("training_start", "training", data=data)

    def step(self, number: str, loss: str) -> None:
        metrics = {"steps": [int(number)], "train/loss": [float(loss)], "train/steps": int(number)}
        self.emit("step_complete", f"step {number}", metrics=metrics)

    def save(self, number: str) -> None:
        resume = {"step": int(number), "state_path": f"tinker://state/{number}", "extra": {"from": int(number)}}
        artifacts = {"latest_checkpoint": f"tinker://weights/{number}"}
        self.emit("checkpoint_saved", f"saved {number}", resume=resume, artifacts=artifacts)

    def end(self) -> None:
        artifacts = {"checkpoints": ["tinker://weights/final"]}
        self.emit("training_end", "done", metrics={"train/loss_last": 0.5}, artifacts=artifacts)

    def fail(self, *words: str) -> None:
        text = " ".join(words)
        self.emit("training_error", f"failed: {text}", level="error", error=text)

    def say(self, *words: str) -> None:
        sys.stdout.write(" ".join(words) + "\n")
        sys.stdout.flush()

    def print(self, *words: str) -> None:
        sys.stderr.write(" ".join(words) + "\n")

    def wait(self) -> None:
        if sys.stdin.readline() != "cancel\n":
            sys.exit(3)
        self.emit("cancelled", "stopped as asked")
        sys.exit(0)

    def hang(self) -> None:
        threading.Event().wait()

    def gate(self, name: str) -> None:
        path = Path(self.spec["directory"]) / name
        if not path.exists():
            os.mkfifo(path)
        self.emit("log", f"at gate {name}")
        path.read_bytes()

    def exit(self, status: str) -> None:
        sys.exit(int(status))

    def kill(self, attempt: str = "") -> None:
        if attempt in ("", str(self.spec["attempt"])):
            os.kill(os.getpid(), signal.SIGKILL)

    def train(self) -> None:
        session = self._call("create_session", {"tags": [], "sdk_version": "0"})["session_id"]
        model = {"session_id": session, "model_seq_id": 0, "base_model": "local/tiny", "lora_config": {"rank": 4}}
        model_id = self._run("create_model", model)["model_id"]
        targets = {"data": [4, 5, 6], "dtype": "int64", "shape": [3]}
        tokens = {"chunks": [{"type": "encoded_text", "tokens": [3, 4, 5]}]}
        datum = {"model_input": tokens, "loss_fn_inputs": {"target_tokens": targets}}
        wanted = {"loss_fn": "cross_entropy", "data": [datum]}
        self._run("forward_backward", {"model_id": model_id, "seq_id": 1, "forward_backward_input": wanted})

    def _run(self, path: str, body: object) -> Any:
        return self._call("retrieve_future", {"request_id": self._call(path, body)["request_id"]})

    def _call(self, path: str, body: object) -> Any:
        headers = {"content-type": "application/json", "x-api-key": self.spec["api_key"]}
        url = f"{self.spec['base_url']}/api/v1/{path}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as response:
            return json.load(response)


def main() -> None:
    spec = json.loads(sys.stdin.readline())
    program = [tag.split() for tag in spec["request"]["tags"]]
    if spec["resume"] is not None:
        place = program.index(["save", str(spec["resume"]["step"])])
        program = [["start"], *program[place + 1 :]]
    player = Player(spec)
    for name, *arguments in program:
        getattr(player, name)(*arguments)


if __name__ == "__main__":
    main()
