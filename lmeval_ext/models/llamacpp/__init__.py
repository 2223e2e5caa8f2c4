"""The adapter for llama.cpp, which runs in process."""
