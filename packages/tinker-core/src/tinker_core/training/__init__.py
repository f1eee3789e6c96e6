"""Training maths shared by every torch trainer: adapters, packed LoRA linears, losses, logprobs, optimizers."""
