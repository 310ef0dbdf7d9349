"""Whole pipelines of diffusers: the networks of a folder, each as the program of one part."""
