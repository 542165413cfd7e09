"""The kernels: C++ that computes a step on a CPU, how it is compiled, and how it is called."""
