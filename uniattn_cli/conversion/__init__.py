"""From base weights and a layout to a fitted checkpoint."""
