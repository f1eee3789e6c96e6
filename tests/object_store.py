"""A real S3 server in a process of its own, which keeps objects as files and checks signatures."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs

KEY_ID = "test-access-key"
SECRET = "test-secret-key"
BUCKET = "checkpoints"


@attrs.define(eq=False)
class S3Server:
    """Keeps the objects of a bucket below ``root / BUCKET``, by their names."""

    root: Path
    port: int = 0
    process: subprocess.Popen[str] | None = None

    @property
    def bucket(self) -> Path:
        return self.root / BUCKET

    @property
    def environment(self) -> Mapping[str, str]:
        """What clients need."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Serve, on the same port as before."""
        command = ["rclone", "serve", "s3", str(self.root), "--config", os.devnull]
        command += ["--addr", f"127.0.0.1:{self.port}", "--auth-key", f"{KEY_ID},{SECRET}"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        said = ""
        for line in self.process.stderr:
            said += line
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                return
        raise AssertionError(f"rclone did not start: {said}")

    def stop(self) -> None:
        """Be gone."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@contextlib.contextmanager
def serve_s3(root: Path) -> Iterator[S3Server]:
    """A server with one empty bucket for the length of a block."""
    server = S3Server(root)
    server.bucket.mkdir(parents=True)
    try:
        server.start()
        yield server
    finally:
        server.stop()
