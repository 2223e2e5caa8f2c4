"""Specs to jobs: what is run, under which key, and what is measured against which reference."""
