"""Everything around a vLLM engine, without vLLM: connections, who runs what, and what happens when engines are lost."""
