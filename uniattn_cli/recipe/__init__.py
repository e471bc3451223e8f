"""The recipe: its schema, how it is read, and the ready ones."""
