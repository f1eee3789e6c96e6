"""The HTTP server of the Tinker API: a thin Starlette app around the engine of tinker-core."""
