"""Models: names, files, and their weights as the kernels read them."""
