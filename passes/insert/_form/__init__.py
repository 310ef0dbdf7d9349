"""The form of passes that put a module into a network."""
