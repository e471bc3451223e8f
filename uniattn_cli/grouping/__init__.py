"""Choosing the layout."""
