"""Masks of single weights: their patterns, layers, training."""
