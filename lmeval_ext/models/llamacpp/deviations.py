"""Where llama.cpp computes something else than a model's own code, whatever the file says: notes for the result.

Found and measured by tests/architectures/test_llamacpp.py, with llama-cpp-python 0.3.36.
"""

from __future__ import annotations

# By `general.architecture`
DEVIATIONS = {
    # ggml_rope_yarn_corr_dims; config.json has "truncate": false
    "gpt-oss": "llama.cpp rounds the ends of YaRN's range to whole dimensions, with which gpt-oss was not trained",
    # src/models/starcoder2.cpp
    "starcoder2": "llama.cpp attends to all tokens, although StarCoder 2 has a sliding window (4096 tokens)",
    # src/models/qwen2vl.cpp
    "qwen2vl": "llama.cpp takes 0 for the epsilon of the norms of Qwen2-VL and 2.5-VL",
}
