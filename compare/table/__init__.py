"""Comparisons as tables: all fields of a point, columns for readers, and the output formats."""
