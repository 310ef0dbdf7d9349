"""What recipes of denoisers share."""
