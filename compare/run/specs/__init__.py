"""Reads spec files: their schema, loading, paths, and which harness model an entry means."""
