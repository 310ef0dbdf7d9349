"""Shuffles of phases from channels to places, found and made."""
