"""Residual units of a network, and networks with fewer of them."""
