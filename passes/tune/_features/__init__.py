"""Values inside a network that a recipe looks at or changes while it trains."""
