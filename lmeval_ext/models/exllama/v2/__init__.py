"""ExLlamaV2."""
