"""Sparse autoencoders: the mathematics of each architecture, sparse codes, other tools' file formats."""
