"""How redundant are a model's attention maps?"""
