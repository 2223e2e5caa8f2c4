"""Adapters: one file an engine, and the small contract they share (`base`)."""
