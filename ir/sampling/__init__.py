"""Sampling of denoisers: schedules, the canonical pair (D, E), solvers, guidance, the driver."""
