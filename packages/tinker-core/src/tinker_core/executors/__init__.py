"""Ways to start, talk to and watch the worker processes of a base model."""
