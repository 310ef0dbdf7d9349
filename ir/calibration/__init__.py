"""Calibration: observers of activations, and the walk that solves layers one by one."""
