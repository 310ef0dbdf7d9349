"""Following teachers: what is compared, and how."""
