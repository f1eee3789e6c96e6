"""Models to measure on: SmolLM2-135M from the quickstart's preparation, or a tiny random one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]


def smollm2() -> Path:
    """The directory of SmolLM2-135M-Instruct, converted on the first call."""
    script = ROOT / "scripts" / "prepare_smollm2.py"
    result = subprocess.run([sys.executable, str(script)], check=True, stdout=subprocess.PIPE, text=True)
    return Path(result.stdout.strip().splitlines()[-1])


def write_tiny_llama(directory: Path) -> Path:
    """A random Llama of about 0.1 million parameters; time spent in it is next to nothing."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def vocabulary_size(model: Path) -> int:
    """Number of tokens that a model's tokenizer knows."""
    return len(AutoTokenizer.from_pretrained(model))
