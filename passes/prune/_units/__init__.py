"""Units of channel groups: scores, selection, gradients."""
