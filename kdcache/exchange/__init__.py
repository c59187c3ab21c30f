"""Caches written in the formats of other distillation tools, and read from them."""
