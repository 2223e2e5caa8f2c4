"""Replaces the package `lm_eval` for the fork server: the modules it imports, and the stub harness to run."""
