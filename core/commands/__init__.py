"""Commands of the toolbox, one file each."""
