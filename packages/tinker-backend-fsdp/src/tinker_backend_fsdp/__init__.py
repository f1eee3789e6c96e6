"""Trainer ``fsdp`` (FSDP2) and sampler ``colocated``; loaded by tinker-server through the entry point ``fsdp``."""
