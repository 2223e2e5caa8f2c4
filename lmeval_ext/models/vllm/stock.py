"""Facts about the harness' own vLLM models (lm-eval 0.4.13). Imports nothing, so that it can be asked without vLLM."""

# These generate a token after every prompt, so a window may fill all positions but one. They drop the start of longer
# windows with no more than a log line.
GENERATE_ONE_TOKEN = ("lm_eval.models.vllm_causallms", "lm_eval.models.vllm_vlms")
