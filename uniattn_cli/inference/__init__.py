"""Decoding without overhead: static caches, kernels that use a leader's map once, one engine for base and converted."""
