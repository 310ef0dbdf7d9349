"""Where a convolutional network makes its image smaller: the choices, and their judges."""
