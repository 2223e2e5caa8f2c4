"""Adapters for ExLlamaV2 (`v2/`) and ExLlamaV3 (`v3/`); what both engines share is in this folder."""
