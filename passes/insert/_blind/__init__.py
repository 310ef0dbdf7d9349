"""What a pixel of a network's output sees of its input."""
