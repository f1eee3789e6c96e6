"""The sampler ``vllm`` with real engines of vLLM's CPU build."""
