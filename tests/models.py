"""Tiny random models on disk, for tests: config, weights and a character-level tokenizer.

``write_tiny_model`` makes what `transformers.AutoModelForCausalLM` and `AutoTokenizer` load from a directory.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any, Literal

Kind = Literal["llama", "qwen2", "qwen3", "qwen3_moe"]

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
VOCAB_SIZE = 112
"""Rows of the embedding; the tokenizer uses the first ``len(SPECIAL_TOKENS) + len(CHARACTERS)`` of them."""
PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(4)
MAX_CONTEXT = 256

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def write_tiny_model(
    directory: Path,
    kind: Kind = "llama",
    *,
    tie: bool = False,
    seed: int = 0,
    hidden_size: int = 32,
    num_layers: int = 2,
    vocab_size: int = VOCAB_SIZE,
    max_context: int = MAX_CONTEXT,
    **changes: Any,
) -> Path:
    """Write a random model of one architecture and return its directory; equal arguments give equal weights.

    ``changes`` are further fields of its Hugging Face configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(
        kind,
        tie=tie,
        hidden_size=hidden_size,
        num_layers=num_layers,
        vocab_size=vocab_size,
        max_context=max_context,
        **changes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".bias"):
                    parameter.normal_(0.0, 0.1)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    write_tokenizer(directory, max_context)
    return directory


def tiny_config(
    kind: Kind,
    *,
    tie: bool,
    hidden_size: int,
    num_layers: int,
    vocab_size: int,
    max_context: int,
    **changes: Any,
) -> Any:
    """The Hugging Face config of a tiny model with grouped-query attention."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": max_context,
        "tie_word_embeddings": tie,
        # Wide enough that the untrained model is far from uniform.
        "initializer_range": 0.15,
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
    } | changes
    if kind == "llama":
        return LlamaConfig(**common)
    if kind == "qwen2":
        return Qwen2Config(**common)
    if kind == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
        return Qwen3MoeConfig(**experts | common, moe_intermediate_size=hidden_size // 2, head_dim=hidden_size // 4)
    return Qwen3Config(**common, head_dim=hidden_size // 4)


def write_tokenizer(directory: Path, max_context: int = MAX_CONTEXT) -> None:
    """Write a tokenizer with one token per printable ASCII character."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=max_context,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(directory)
