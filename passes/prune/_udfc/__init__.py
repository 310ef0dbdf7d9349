"""Closed-form repair of UDFC and its baselines."""
