"""The engines as a sampler sees them: on this machine, on others, and plain vLLM servers."""
