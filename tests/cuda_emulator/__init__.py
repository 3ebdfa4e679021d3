"""Runs the .cu files of kernels/cuda on a processor, for tests: see README.md."""
