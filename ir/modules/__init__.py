"""Operators as `nn.Module`s: in a model of one's own, or put into a traced one by `insert.*`."""
