"""The sparse engine for CPUs: packed weights, kernels, and layers that run on them."""
