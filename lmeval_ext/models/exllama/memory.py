"""GPU memory of the ExLlama engines: measured, freed, and planned."""

from __future__ import annotations

import gc
from typing import Any

import torch

from lmeval_ext.models.exllama.config import text_config
from lmeval_ext.models.record import GIB, Quantization

_EMBEDDING_SHARE = 0.05  # of a GPU's memory: token embeddings up to that are held there while scoring


def gpu_embedding(first: Any, device: Any, wanted: bool | None) -> torch.nn.Embedding | None:
    """A copy of the token embeddings for scoring; None where they stay where they are.

    first: the engine's embedding module. device: of its first layer. wanted: None: if they are small.
    """
    weight = getattr(getattr(first, "embedding", None), "weight", None)
    if wanted is False or not isinstance(weight, torch.Tensor) or weight.device.type != "cpu":
        return None
    device = torch.device(device)
    if wanted is None and weight.nbytes > _EMBEDDING_SHARE * torch.cuda.get_device_properties(device).total_memory:
        return None
    return torch.nn.Embedding(*weight.shape, _weight=weight.data.to(device), _freeze=True)


def allocated_bytes() -> int:
    """GPU memory that this process' tensors take, all GPUs together."""
    return sum(torch.cuda.memory_allocated(d) for d in range(torch.cuda.device_count()))


def reset_peak_memory() -> None:
    """Let `measured_memory` count from here."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)


def measured_memory(facts: Quantization, kv_bytes: int, weights_bytes: int | None) -> Quantization:
    """Peak GPU memory since the last reset, all GPUs of this process together, without the KV cache."""
    if torch.cuda.is_available():
        peak = sum(torch.cuda.max_memory_allocated(d) for d in range(torch.cuda.device_count()))
        facts.peak_vram_gb = (peak - kv_bytes) / GIB
        facts.kv_pool_gb = kv_bytes / GIB
        if weights_bytes is not None:
            facts.weight_vram_gb = weights_bytes / GIB
    return facts


def quantized_cache(facts: Quantization, bits: tuple[int, int] | None) -> Quantization:
    """A cache of so many bits for keys and values: groups of 32 elements share a float16 scale."""
    if bits is not None:
        facts.kv_cache_dtype = f"q{bits[0]}" if bits[0] == bits[1] else f"q{bits[0]}/q{bits[1]}"
        if facts.kv_bytes_per_token is not None:
            facts.kv_bytes_per_token = round(facts.kv_bytes_per_token * (bits[0] + bits[1] + 1) / 32)
    return facts


def default_cache_tokens(total_bytes: int, bytes_per_token: int | None, max_length: int, asked_length: bool) -> int:
    """Tokens of the KV cache where none are asked for: a tenth of the GPU, 32768 at most, 8192 or the model's at least.

    asked_length: whether max_length was asked for; the cache then holds one sequence of it.
    """
    least = max_length if asked_length else min(max_length, 8192)
    tokens = least if not bytes_per_token else max(least, min(32768, total_bytes // 10 // bytes_per_token))
    return -(-tokens // 256) * 256


def activation_bytes(config: dict[str, Any]) -> int:
    """What a forward needs a token, roughly: a few float32 states and the MLP's inner ones."""
    text = text_config(config)
    hidden, inner = int(text.get("hidden_size") or 4096), text.get("intermediate_size")
    experts = int(text.get("num_experts_per_tok") or 1)
    width = int(inner) if isinstance(inner, int) else 4 * hidden
    return 4 * (8 * hidden + 4 * width * experts)


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA ran out of memory: torch says so itself, an engine's own allocations say it in words."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    )


def release_memory() -> None:
    """Give what is cached back, so that a smaller batch finds room."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be had on the fullest GPU in use: free, or idle in PyTorch's allocator. None for a CPU."""
    if device.type != "cuda":
        return None
    used = {device.index or 0, *(d for d in range(torch.cuda.device_count()) if torch.cuda.memory_allocated(d))}
    return min(
        torch.cuda.mem_get_info(d)[0] + torch.cuda.memory_reserved(d) - torch.cuda.memory_allocated(d) for d in used
    )
