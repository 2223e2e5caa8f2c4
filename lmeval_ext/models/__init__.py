"""Adapters: one folder per engine behind one small contract; README.md says what each file does."""
