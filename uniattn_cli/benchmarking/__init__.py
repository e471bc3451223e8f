"""The verb `bench`: what decoding costs, beside the limit and beside transformers."""
