"""Parts that the adapters share: the base of their passes, and low-rank branches."""
