"""ExLlamaV2 and ExLlamaV3."""
