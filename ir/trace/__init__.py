"""From an `nn.Module` to a Program."""
