"""Part of Graphwright."""
