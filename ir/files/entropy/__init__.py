"""Lossless entropy coding of integer tensors in files: a circuit over rows, and a range coder."""
