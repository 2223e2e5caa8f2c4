"""Tiny random checkpoints of several architectures, and their log-probabilities by a plain Transformers forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.conftest import VOCABULARY, make_tokenizer

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
ORIGINAL = 64  # the original context of the model with LongRoPE
_FACTORS = {"short_factor": [1 + 0.05 * i for i in range(16)], "long_factor": [1 + 0.3 * i for i in range(16)]}
_LATENT: dict[str, Any] = {  # sizes that vLLM's latent attention takes on a CPU
    "num_key_value_heads": 4, "kv_lora_rank": 512, "q_lora_rank": 48, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("Phi3Config", {"sliding_window": None, "original_max_position_embeddings": ORIGINAL,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0,
                            "original_max_position_embeddings": ORIGINAL, **_FACTORS}}),
    "latent": ("DeepseekV2Config", {**_LATENT, "topk_method": "greedy"}),
    "mamba2": ("FalconH1Config", {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_d_state": 16,
        "mamba_n_groups": 1, "mamba_chunk_size": 32, "lm_head_multiplier": 0.6, "embedding_multiplier": 3.0,
        "head_dim": 32}),
    "narrow_head": ("OPTConfig", {"ffn_dim": 256, "word_embed_proj_dim": 64, "do_layer_norm_before": False,
        "init_std": 0.1}),
    "experts": ("Qwen3MoeConfig", {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64, "decoder_sparse_step": 1, "norm_topk_prob": True}),
}  # fmt: skip


def make_model(folder: Path, name: str, **changes: Any) -> Path:
    """Writes a random float32 checkpoint of an architecture, and its tokenizer."""
    kind, settings = ARCHITECTURES[name]
    config = getattr(transformers, kind)(**(COMMON | settings | changes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():  # log-probabilities that differ, and biases that are not zero
        head = model.get_output_embeddings().weight
        head.mul_(2.5 / (head.std() * head.shape[1] ** 0.5))
        for key, parameter in model.named_parameters():
            if key.endswith("bias") and parameter.ndim == 1 and "dt_bias" not in key:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def plain_logprobs(folder: Path, windows: list[list[int]], first: int = 1) -> list[np.ndarray]:
    """Log-probabilities of tokens `first` … of each window, float64 of float32 logits; the last token is not fed."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scores = []
    for ids in windows:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0].double()
        wanted = torch.tensor(ids[first:])
        scores.append(logits[first - 1 :].log_softmax(-1).gather(1, wanted[:, None])[:, 0].numpy())
    return scores


def random_windows(*lengths: int) -> list[list[int]]:
    """Random token ids, for each length the same every time."""
    return [np.random.default_rng(n).integers(2, VOCABULARY, n).tolist() for n in lengths]
