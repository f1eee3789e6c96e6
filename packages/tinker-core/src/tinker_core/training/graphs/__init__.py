"""Custom losses with torch: the allowed operations, their guards, and the run of a graph as a loss."""
