"""Trainer ``megatron`` (Megatron-Core); loaded by tinker-server through the entry point ``megatron``."""
