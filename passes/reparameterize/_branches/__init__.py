"""What the passes share that fold training-time branches."""
