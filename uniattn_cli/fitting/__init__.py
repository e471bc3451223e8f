"""Least-squares fitting of changed layers to the base, in streams of hidden states."""
