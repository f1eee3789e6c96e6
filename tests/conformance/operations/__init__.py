"""What a client does with the SDK, in the order it is done; each module adds to one list of operations."""
