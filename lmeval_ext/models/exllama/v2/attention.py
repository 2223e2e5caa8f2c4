"""Repairs ExLlamaV2 0.3.2's attention where it leaves out the causal mask."""

from __future__ import annotations

from typing import Any

import torch
from exllamav2 import attn as v2_attention

from lmeval_ext.errors import UserError

_original_attention = v2_attention.ExLlamaV2Attention._attn_torch


def causal_attention(
    self: Any, batch_size: int, q_len: int, q: Any, k: Any, v: Any, params: Any, cfg: Any, causal: bool = True
) -> Any:
    """Replaces `ExLlamaV2Attention._attn_torch`, which in 0.3.2 passes no mask to PyTorch's attention.

    (`if … or causal: attn_mask_lr = attn_params.get_block_diag_mask(…)` is None for text, so every token sees all later
    ones.) q: [batch, q_len, heads, dim]; k, v: [batch, k_len, KV heads, dim], whose last q_len positions are the
    queries' own. Cases that PyTorch's attention cannot compute stay with the engine's own products, which are masked.
    Raises UserError where those are wrong, too: with a sliding window they keep the last keys for every query.
    """
    plain = causal and params.is_causal() and not cfg.attn_logit_softcapping and not cfg.no_sdpa
    window = int(self.sliding_window or 0)
    if not plain or self.layer_idx in params.block_diag_layers:
        if window and k.shape[1] > window and q_len > 1:
            raise UserError(
                f"{k.shape[1]} tokens: without flash-attn, ExLlamaV2 0.3.2 attends wrongly beyond this model's sliding "
                f"window of {window}; lower eval_len or max_length to {window}, or install flash-attn 2.6 or newer"
            )
        return _original_attention(self, batch_size, q_len, q, k, v, params, cfg, causal)
    k_len, heads, dim = k.shape[1], q.shape[2], q.shape[3]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    k, v = self.repeat_kv(k, self.num_key_value_groups), self.repeat_kv(v, self.num_key_value_groups)
    mask, is_causal = None, q_len == k_len and q_len > 1
    if window and k_len > window:
        behind = torch.arange(k_len - q_len, k_len, device=q.device)[:, None] - torch.arange(k_len, device=q.device)
        mask, is_causal = (behind >= 0) & (behind < window), False
    elif not is_causal and q_len > 1:
        mask = v2_attention.causal_lower_right(q_len, k_len)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=self.scaling)
    return out.transpose(1, 2).reshape(batch_size, q_len, heads * dim)


def repair_attention(config: Any = None) -> str:
    """Installs `causal_attention` for all cases in which the engine uses PyTorch; returns the name of what attends.

    config: an ExLlamaV2Config after `arch_compat_overrides()`, which excludes what an architecture cannot be run with.
    None: before there is one, as for the engine's converter.
    """
    v2_attention.ExLlamaV2Attention._attn_torch = causal_attention
    if v2_attention.has_flash_attn and not getattr(config, "no_flash_attn", False):
        return "flash-attn"
    if v2_attention.has_xformers and not getattr(config, "no_xformers", False):
        return "xformers"
    eager = getattr(config, "no_sdpa", False) or getattr(config, "attn_logit_softcapping", None)
    return "torch matmul" if eager else "torch SDPA"
