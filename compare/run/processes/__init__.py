"""Runs tasks: local and Ray pools, one harness process per task, and the outcome of each."""
