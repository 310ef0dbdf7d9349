"""Arithmetic of the quantize passes: functions of tensors."""
