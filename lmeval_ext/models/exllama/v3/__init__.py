"""The adapter for ExLlamaV3.

`adapter`, `engine` and `generation` import the engine at once; the other modules do not.
"""
