"""vLLM: `vllm_nvfp4`."""
