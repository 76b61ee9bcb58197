"""Headwater: one host copy of a model's weights, one stream of them to each GPU, every request rides it."""

__version__ = "0.1.0"
