"""Trying a model out: one answer (`generate`), a conversation (`chat`), and the samples of the evaluation."""
