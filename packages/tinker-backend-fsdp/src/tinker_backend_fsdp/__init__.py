"""Trainer ``fsdp`` (FSDP2); loaded by tinker-server through the entry point ``fsdp``."""
