"""Perplexity tasks: one YAML file a task, and the one Task class behind them."""
