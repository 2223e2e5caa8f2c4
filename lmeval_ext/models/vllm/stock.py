"""Facts about the harness' own vLLM models (lm-eval 0.4.13). Imports nothing: they are needed without vLLM, too."""

# These generate a token after every prompt, so a window may fill all positions but one. They drop the start of longer
# windows with no more than a log line.
SPARE_POSITIONS = {"lm_eval.models.vllm_causallms": 1, "lm_eval.models.vllm_vlms": 1}
