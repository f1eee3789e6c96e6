"""The sampler ``vllm``: samples from vLLM engines, on this machine or on others."""
