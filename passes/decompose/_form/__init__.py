"""What the decompositions share: which layers, which ranks, and factors in the graph."""
