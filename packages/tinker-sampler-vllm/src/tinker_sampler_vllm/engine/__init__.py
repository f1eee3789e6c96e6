"""The engine process: one vLLM engine behind a socket."""
