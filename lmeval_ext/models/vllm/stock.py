"""Facts about the harness' own vLLM models (lm-eval 0.4.13). Imports nothing: they are used without vLLM, too."""

# These models generate a token after every prompt, so a window may fill all positions but one. They cut longer windows
# on the left and only log it.
SPARE_POSITIONS = {"lm_eval.models.vllm_causallms": 1, "lm_eval.models.vllm_vlms": 1}
