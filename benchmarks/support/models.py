"""Models to measure on: SmolLM2-135M from the quickstart's preparation, or a tiny random one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


def write_chat_tokenizer(directory: Path) -> None:
    """A tokenizer with one token per character, and a chat template, beside `write_tiny_llama`'s weights."""
    specials = ("<bos>", "<eos>", "<unk>")
    vocabulary = {token: index for index, token in enumerate((*specials, *map(chr, range(32, 127)), "\n"))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template="{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)


def vocabulary_size(model: Path) -> int:
    """Number of tokens that a model's tokenizer knows."""
    return len(AutoTokenizer.from_pretrained(model))
