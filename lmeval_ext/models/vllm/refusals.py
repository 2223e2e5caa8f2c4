"""Models that vLLM would score wrongly, or fail on at the first request: one line before the engine starts."""

from __future__ import annotations

from typing import Any

import torch

from lmeval_ext.errors import UserError
from lmeval_ext.models.vllm import cpu_rotary

_MAMBA_1 = {"mamba", "falcon_mamba", "jamba"}  # model types


def check(config: Any, pretrained: str, version: str, on_cpu: bool) -> None:
    """Raises UserError for such a model.

    config: vLLM's ModelConfig. pretrained: for messages. version: of vLLM. on_cpu: whether it runs on a CPU.
    """
    _check_dynamic_positions(config, pretrained)
    if not on_cpu:
        return
    if config.use_mla and not cpu_rotary.is_right():
        raise UserError(
            f"pretrained={pretrained!r}: on a CPU, this vLLM ({version}) may rotate multi-head latent attention "
            "wrongly; run the checkpoint with --model hf_quant"
        )
    if config.hf_text_config.model_type in _MAMBA_1 and not hasattr(torch.ops._C, "selective_scan_fwd"):
        raise UserError(
            f"pretrained={pretrained!r}: this vLLM ({version}) has no kernel for Mamba's first version on a CPU; use "
            "--model hf_quant"
        )
    # vllm/model_executor/layers/mamba/ops/cpu/gdn_attention.py (0.32): an assertion at the first forward
    delta_net = getattr(config.hf_text_config, "linear_num_value_heads", None)
    if delta_net and config.dtype != torch.bfloat16:
        dtype = str(config.dtype).removeprefix("torch.")
        raise UserError(
            f"pretrained={pretrained!r}: on a CPU, vLLM computes gated delta nets in bfloat16 only, not in {dtype}; "
            "use dtype=bfloat16, or --model hf_quant"
        )


def _check_dynamic_positions(config: Any, pretrained: str) -> None:
    """Dynamic scaling of rotary positions: vLLM makes a table of max_position_embeddings rows, and reads beyond it.

    Within them its frequencies are those of Transformers (vllm/model_executor/layers/rotary_embedding/__init__.py,
    0.32); a longer context got NaN.
    """
    text = config.hf_text_config
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    positions = getattr(text, "max_position_embeddings", None)
    dynamic = isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "dynamic"
    if dynamic and positions and config.max_model_len > positions:
        raise UserError(
            f"pretrained={pretrained!r}: max_model_len={config.max_model_len}, but with dynamic scaling vLLM has "
            f"rotary frequencies for {positions} positions only; set max_model_len to at most {positions}, or use "
            "--model hf_quant"
        )
