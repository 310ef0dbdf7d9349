"""Layers of a program: their kinds, selectors, products, biases."""
