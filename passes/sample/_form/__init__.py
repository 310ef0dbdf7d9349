"""What the passes of the family share."""
