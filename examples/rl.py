"""Reinforcement learning with the Tinker SDK: a chat model learns to write out the whole equation.

Asked for a sum, the model is told to reply with only the number. The reward is 1 for a reply that contains "=".
Wants TINKER_BASE_URL and TINKER_API_KEY in the environment, and: pip install tinker
"""

from __future__ import annotations

import argparse
import random

import tinker
from tinker import types

SYSTEM = "Reply with only the number."


def reward(completion: str) -> float:
    return float("=" in completion)


def make_prompt(tokenizer, rng: random.Random) -> list[int]:
    question = f"What is {rng.randint(10, 99)} + {rng.randint(10, 99)}?"
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


def make_datum(prompt: list[int], sequence: types.SampledSequence, advantage: float) -> types.Datum:
    """Position i predicts token i + 1; the prompt has no advantage, every sampled token has that of its reply."""
    tokens = prompt + sequence.tokens
    before = len(prompt) - 1
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "logprobs": [0.0] * before + sequence.logprobs,
            "advantages": [0.0] * before + [advantage] * len(sequence.tokens),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="base model; default: the first one that the server serves")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=4, help="prompts per step")
    parser.add_argument("--group-size", type=int, default=6, help="replies per prompt")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)

    with tinker.ServiceClient() as service:
        model = args.model or tinker.RestClient().get_server_capabilities().result().supported_models[0].model_name
        training = service.create_lora_training_client(base_model=model, rank=args.rank, seed=args.seed).result()
        tokenizer = training.get_tokenizer()
        for step in range(args.steps):
            policy = training.save_weights_and_get_sampling_client().result()
            prompts = [make_prompt(tokenizer, rng) for _ in range(args.prompts)]
            sampling_params = types.SamplingParams(max_tokens=8, temperature=1.0, seed=rng.getrandbits(31))
            futures = [
                policy.sample(types.ModelInput.from_ints(prompt), args.group_size, sampling_params)
                for prompt in prompts
            ]
            data, rewards = [], []
            for prompt, future in zip(prompts, futures, strict=True):
                sequences = future.result().sequences
                scores = [reward(tokenizer.decode(sequence.tokens)) for sequence in sequences]
                mean = sum(scores) / len(scores)
                for sequence, score in zip(sequences, scores, strict=True):
                    data.append(make_datum(prompt, sequence, advantage=score - mean))
                rewards += scores
            training.forward_backward(data, "importance_sampling")
            training.optim_step(types.AdamParams(learning_rate=args.learning_rate)).result()
            print(f"step {step + 1:2d}  mean reward {sum(rewards) / len(rewards):.2f}", flush=True)


if __name__ == "__main__":
    main()
