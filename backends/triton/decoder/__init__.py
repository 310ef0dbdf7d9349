"""A decoder over a cache that is written in place: its graph, its buffers, its runner."""
