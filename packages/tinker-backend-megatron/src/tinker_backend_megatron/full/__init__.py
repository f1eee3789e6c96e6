"""Training of all parameters of the base model, by one tenant at a time."""
