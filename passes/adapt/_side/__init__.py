"""Parts of adapt.side_network: the stack of blocks it runs along, and their narrow copies."""
