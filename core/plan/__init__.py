"""What a run will take: estimated before it, and compared with what it took."""
