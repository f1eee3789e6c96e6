"""Custom losses without torch: which operations they may name, and whether a graph is well-formed."""
