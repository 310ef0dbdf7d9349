"""Rules of the channel algebra, one file per kind of operator."""
