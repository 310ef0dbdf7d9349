"""The search of a spec: candidates are ordinary runs, and the best that keeps the bounds wins."""
