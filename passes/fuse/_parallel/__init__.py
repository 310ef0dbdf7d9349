"""Linear layers side by side as one."""
