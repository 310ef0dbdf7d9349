"""Pictures and tables of a program."""
