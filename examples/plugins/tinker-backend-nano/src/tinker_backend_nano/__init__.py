"""An example trainer: Llama in plain PyTorch."""
