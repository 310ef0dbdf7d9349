"""The arithmetic of this family."""
