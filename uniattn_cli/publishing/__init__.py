"""Putting a checkpoint on a hub. Reads what the stages wrote; no stage knows of it."""
