"""Forms that a weight is stored in: read, made, and put into a graph."""
