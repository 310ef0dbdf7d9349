"""Adapters in a program: nodes beside a layer, their tensors, and the record of both."""
