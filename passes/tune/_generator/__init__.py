"""What recipes for generators with a latent share."""
