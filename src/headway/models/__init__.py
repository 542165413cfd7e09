"""Models: names, files, and the decoder graph."""
