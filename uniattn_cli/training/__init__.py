"""Post-training of a converted model."""
