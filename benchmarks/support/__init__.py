"""What the benchmarks share: a running server, a stub in its place, data, and the printed result."""
