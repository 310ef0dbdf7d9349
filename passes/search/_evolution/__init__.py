"""An evolution of levels of compression, one per layer, under a budget that is kept exactly."""
