"""The trunk of a network: residual units, modules made of them, and modules put elsewhere."""
