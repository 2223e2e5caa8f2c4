"""ExLlamaV3."""
