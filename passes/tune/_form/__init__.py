"""What the passes that train have in common."""
