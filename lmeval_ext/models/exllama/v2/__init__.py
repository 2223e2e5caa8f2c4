"""The adapter for ExLlamaV2.

`adapter`, `attention`, `engine` and `generation` import the engine at once; the other modules do not.
"""
