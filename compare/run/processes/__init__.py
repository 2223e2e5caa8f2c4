"""Jobs to processes: local and Ray pools, one harness process per model."""
