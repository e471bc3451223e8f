"""From files to token sequences."""
