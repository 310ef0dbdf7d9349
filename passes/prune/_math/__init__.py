"""Arithmetic of the prune passes: functions of tensors."""
