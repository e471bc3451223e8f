"""Which layers share, and how a layout is chosen."""
