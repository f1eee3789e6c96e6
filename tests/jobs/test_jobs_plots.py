"""The plot of a job's loss or reward."""

from __future__ import annotations

import subprocess
import sys
import threading
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.workers import make_spec
from tinker_jobs.plots import curve_of, draw
from tinker_jobs.protocol import EventType, JobEvent
from tinker_jobs.worker.run import JobRun

LOSS: dict[str, Any] = {"steps": [1, 2, 3], "train/loss": [3.0, 2.0, 1.5], "eval/loss": 1.7}
REWARD: dict[str, Any] = {
    "steps": [1, 2, 3],
    "train/reward": [0.1, None, 0.9],
    "train/reward_min_per_step": [0.0, 0.0, 0.5],
    "train/reward_max_per_step": [1.0, 1.0, 1.0],
    "eval/steps": [2],
    "eval/reward": [0.4],
}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(("metrics", "curve"), [(LOSS, "loss"), (REWARD, "reward"), ({"train/loss_last": 1.0}, None)])
def test_the_curve_is_what_the_steps_have(metrics: dict[str, Any], curve: str | None) -> None:
    assert curve_of(metrics) == curve


@pytest.mark.parametrize("metrics", [LOSS, REWARD, {"steps": [1], "train/loss": [2.0]}])
def test_a_curve_is_an_svg_and_a_png(metrics: dict[str, Any], tmp_path: Path) -> None:
    draw(metrics, tmp_path / "curve.svg")
    draw(metrics, tmp_path / "curve.png")
    assert ElementTree.parse(tmp_path / "curve.svg").getroot().tag.endswith("}svg")
    assert (tmp_path / "curve.png").read_bytes().startswith(PNG)


def test_the_line_follows_the_values(tmp_path: Path) -> None:
    draw({"steps": [1, 2, 3], "train/loss": [3.0, 1.0, 2.0]}, tmp_path / "curve.svg")
    paths = ElementTree.parse(tmp_path / "curve.svg").iter("{http://www.w3.org/2000/svg}path")
    # The one path of three corners that is drawn in the colour of training.
    (line,) = [path for path in paths if "#1f6fb2" in path.get("style", "")]
    words = line.get("d", "").split()
    x, y = [float(word) for word in words[1::3]], [float(word) for word in words[2::3]]
    assert x == sorted(x)
    assert y[0] < y[2] < y[1]  # down is larger


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        draw({"train/loss_last": 1.0}, tmp_path / "curve.svg")
    with pytest.raises(ValueError, match=r"\.svg, \.png"):
        draw(LOSS, tmp_path / "curve.jpeg")
    assert list(tmp_path.iterdir()) == []


def test_neither_the_module_nor_a_drawing_touches_matplotlibs_global_state(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from tinker_jobs.plots import draw
assert "matplotlib" not in sys.modules
draw({LOSS!r}, Path({str(tmp_path)!r}) / "loss.svg")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_picture_that_cannot_be_written_is_reported_and_ends_no_job(tmp_path: Path) -> None:
    events: list[JobEvent] = []
    request = {"backend": "tinker", "trainer_type": "sft", "config": {"dataset_ref": {"name": "d", "version": "1"}}}
    run = JobRun(make_spec("http://127.0.0.1:9", "model", tmp_path, request), events.append, threading.Event())
    (tmp_path / "files").write_text("in the way")
    run.emit(EventType.TRAINING_END, "complete", metrics=LOSS, artifacts={"checkpoints": []})
    warning, end = events
    assert warning.level == "warning"
    assert "the plot of the loss could not be written" in warning.message
    assert (end.event_type, end.artifacts) == (EventType.TRAINING_END, {"checkpoints": []})
