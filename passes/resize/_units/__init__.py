"""Convolutions that choose their kernel for every sample."""
