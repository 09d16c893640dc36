"""Kernels that keep the result and drop the work."""
