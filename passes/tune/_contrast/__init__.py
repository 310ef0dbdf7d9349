"""Contrast: what belongs together comes near, and what does not stays apart."""
