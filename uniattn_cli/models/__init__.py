"""Models: where they are, how they are loaded, built, priced and scored."""
