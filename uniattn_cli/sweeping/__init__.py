"""Many conversions of one model, scored alike."""
