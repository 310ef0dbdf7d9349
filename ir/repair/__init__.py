"""Data-free repair of channels: chains, closed forms (UDFC), merging, and rounding behind them."""
