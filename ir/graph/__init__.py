"""The graph under a program: nodes, constants, shapes, sizes, aliasing, cost."""
