"""Supervised fine-tuning with the Tinker SDK: a chat model learns the answers of a small corpus.

Wants TINKER_BASE_URL and TINKER_API_KEY in the environment, and: pip install tinker chatterbot-corpus matplotlib tqdm
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import chatterbot_corpus
import matplotlib.pyplot as plt
import numpy as np
import tinker
import yaml
from tinker import types
from tqdm import tqdm

QUESTION = "What is the most abundant element in the universe?"
"""One of the held-out questions."""


def load_pairs(seed: int) -> list[tuple[str, str]]:
    """Question and answer pairs, shuffled. Questions occur several times in the corpus; each is kept once."""
    answers: dict[str, tuple[str, str]] = {}
    for file in sorted((Path(chatterbot_corpus.__file__).parent / "data" / "english").glob("*.yml")):
        for question, answer, *_ in yaml.safe_load(file.read_text())["conversations"]:
            answers.setdefault(str(question).strip().lower(), (str(question).strip(), str(answer).strip()))
    pairs = list(answers.values())
    random.Random(seed).shuffle(pairs)
    return pairs


def chat_tokens(tokenizer, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


def make_datum(tokenizer, question: str, answer: str) -> types.Datum:
    """Position i predicts token i + 1; only the answer has weight."""
    prompt = chat_tokens(tokenizer, question)
    completion = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    tokens = prompt + completion
    weights = [0.0] * (len(prompt) - 1) + [1.0] * len(completion)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights},
    )


def loss_per_token(result: types.ForwardBackwardOutput, data: list[types.Datum]) -> float:
    return result.metrics["loss:sum"] / sum(np.sum(datum.loss_fn_inputs["weights"].to_numpy()) for datum in data)


def ask(client: tinker.SamplingClient, tokenizer, question: str) -> str:
    prompt = types.ModelInput.from_ints(chat_tokens(tokenizer, question))
    params = types.SamplingParams(max_tokens=40, temperature=0.0)
    result = client.sample(prompt=prompt, num_samples=1, sampling_params=params).result()
    return tokenizer.decode(result.sequences[0].tokens, skip_special_tokens=True).strip()


def draw(path: Path, train: list[float], held_out: dict[int, float]) -> None:
    plt.plot(range(1, len(train) + 1), train, label="training batch")
    plt.plot(list(held_out), list(held_out.values()), "o-", label="held out")
    plt.xlabel("step")
    plt.xticks(range(0, len(train) + 1, max(1, len(train) // 10)))
    plt.ylabel("loss per token (nats)")
    plt.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="base model; default: the first one that the server serves")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--picture", type=Path, default=Path("loss.png"))
    args = parser.parse_args()

    with tinker.ServiceClient() as service:
        model = args.model or tinker.RestClient().get_server_capabilities().result().supported_models[0].model_name
        training = service.create_lora_training_client(base_model=model, rank=args.rank, seed=0).result()
        tokenizer = training.get_tokenizer()
        data = [make_datum(tokenizer, *pair) for pair in load_pairs(seed=0)]
        data = [datum for datum in data if datum.model_input.length <= 128]
        held_out, train = data[:40], data[40:]

        def evaluate() -> float:
            return loss_per_token(training.forward(held_out, "cross_entropy").result(), held_out)

        base = service.create_sampling_client(base_model=model).result()
        answer_before = ask(base, tokenizer, QUESTION)
        train_losses, held_out_losses = [], {0: evaluate()}
        progress = tqdm(range(args.steps), desc="training", unit="step")
        for step in progress:
            start = step * args.batch_size % (len(train) - args.batch_size)
            batch = train[start : start + args.batch_size]
            # Both requests are sent before the first answer is awaited: the server never idles between them.
            forward_backward = training.forward_backward(batch, "cross_entropy")
            optim_step = training.optim_step(types.AdamParams(learning_rate=args.learning_rate))
            train_losses.append(loss_per_token(forward_backward.result(), batch))
            optim_step.result()
            if (step + 1) % 10 == 0 or step + 1 == args.steps:
                held_out_losses[step + 1] = evaluate()
            progress.set_postfix(loss=f"{train_losses[-1]:.3f}")
        saved = training.save_weights_for_sampler(name="final").result()
        tuned = service.create_sampling_client(model_path=saved.path).result()
        answer_after = ask(tuned, tokenizer, QUESTION)

    draw(args.picture, train_losses, held_out_losses)
    print(f"held-out loss per token: {held_out_losses[0]:.3f} before, {held_out_losses[args.steps]:.3f} after")
    print(f"{QUESTION}\n  before: {answer_before!r}\n  after:  {answer_after!r}")
    print(f"saved as {saved.path}; loss curve in {args.picture}")


if __name__ == "__main__":
    main()
