"""Weights of a base: directories, single files, names, streaming, initialisation."""
