"""Decoding without overhead: static caches, kernels that read lent keys once, one engine for base and converted."""
