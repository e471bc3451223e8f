"""Model code that travels with every checkpoint: flat, and importing torch, transformers and its siblings only."""
