"""Gradient descent on images, unrolled into a graph."""
