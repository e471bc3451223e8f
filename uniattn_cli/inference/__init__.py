"""Decoding without overhead: static caches, kernels that reuse a leader's map, one engine for base and converted."""
