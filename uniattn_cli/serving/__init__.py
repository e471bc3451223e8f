"""Serving converted checkpoints with engines that people already run."""
