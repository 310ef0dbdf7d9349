"""Parts shared by passes that put codes in the place of weights."""
