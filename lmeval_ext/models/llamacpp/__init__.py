"""llama.cpp, in process."""
