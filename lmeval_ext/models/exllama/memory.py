"""GPU memory of the ExLlama engines: sizes, measurements, and what to do when it runs out."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from lmeval_ext.models.exllama.config import text_config
from lmeval_ext.models.record import GIB, Quantization
from lmeval_ext.storage.kv_cache import kv_cache
from lmeval_ext.storage.rounding import round_up

PAGE = 256  # tokens per page of both engines' KV caches (exllamav3.constants.PAGE_SIZE; exllamav2's paged cache)
BLOCK = 32  # lengths are padded to blocks of tokens, so that kernels are compiled and tuned for a few lengths only
_EMBEDDING_SHARE = 0.05  # part of a GPU's memory that a copy of the token embeddings may take by default


# ---------------------------------------------------------------------- sizes


def activation_bytes(config: dict[str, Any]) -> int:
    """Estimates what a forward needs per token: a few float32 states and the MLP's inner ones."""
    text = text_config(config)
    hidden, inner = int(text.get("hidden_size") or 4096), text.get("intermediate_size")
    experts = int(text.get("num_experts_per_tok") or 1)
    width = int(inner) if isinstance(inner, int) else 4 * hidden
    return 4 * (8 * hidden + 4 * width * experts)


def cache_size(folder: Path, tokens: int | None, max_length: int, length_is_given: bool) -> int:
    """Returns the tokens of the KV cache, in whole pages.

    tokens: the argument cache_tokens; None: `default_cache_tokens` of the first GPU.
    """
    if tokens is None:
        total = torch.cuda.get_device_properties(0).total_memory
        per_token = kv_cache(folder, "float16", "float16").bytes_per_token
        tokens = default_cache_tokens(total, per_token, max_length, length_is_given)
    return round_up(int(tokens), PAGE)


def default_cache_tokens(total_bytes: int, bytes_per_token: int | None, max_length: int, length_is_given: bool) -> int:
    """Returns the default size of the KV cache in tokens: a tenth of the GPU, between two limits.

    At most 32768; at least 8192, or max_length if that is less. length_is_given: max_length is the user's, and the
    cache then holds at least one sequence of it. bytes_per_token: None if unknown, which gives the lower limit.
    """
    least = max_length if length_is_given else min(max_length, 8192)
    tokens = least if not bytes_per_token else max(least, min(32768, total_bytes // 10 // bytes_per_token))
    return round_up(tokens, PAGE)


def gpu_embedding(module: Any, device: Any, on_gpu: bool | None) -> torch.nn.Embedding | None:
    """Copies the token embeddings to the GPU for scoring; returns None if they stay where they are.

    module: the engine's embedding module. device: that of its first layer. on_gpu: None: copy them if they take at most
    5 % of the GPU's memory.
    """
    weight = getattr(getattr(module, "embedding", None), "weight", None)
    if on_gpu is False or not isinstance(weight, torch.Tensor) or weight.device.type != "cpu":
        return None
    device = torch.device(device)
    if on_gpu is None and weight.nbytes > _EMBEDDING_SHARE * torch.cuda.get_device_properties(device).total_memory:
        return None
    return torch.nn.Embedding(*weight.shape, _weight=weight.data.to(device), _freeze=True)


# ---------------------------------------------------------------------- measurements


def allocated_bytes() -> int:
    """Returns the GPU memory of this process' tensors, all GPUs together."""
    return sum(torch.cuda.memory_allocated(d) for d in range(torch.cuda.device_count()))


def free_bytes(device: torch.device) -> int | None:
    """Returns the memory available on the fullest GPU in use: free, or idle in PyTorch's allocator. None for a CPU."""
    if device.type != "cuda":
        return None
    used = {device.index or 0, *(d for d in range(torch.cuda.device_count()) if torch.cuda.memory_allocated(d))}
    return min(
        torch.cuda.mem_get_info(d)[0] + torch.cuda.memory_reserved(d) - torch.cuda.memory_allocated(d) for d in used
    )


def reset_peak_memory() -> None:
    """Starts the measurement of `describe_memory`."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)


def describe_memory(facts: Quantization, kv_bytes: int, weights_bytes: int | None) -> Quantization:
    """Adds the peak GPU memory since the last reset: all GPUs of this process together, without the KV cache."""
    if torch.cuda.is_available():
        peak = sum(torch.cuda.max_memory_allocated(d) for d in range(torch.cuda.device_count()))
        facts.peak_vram_gb = (peak - kv_bytes) / GIB
        facts.kv_pool_gb = kv_bytes / GIB
        if weights_bytes is not None:
            facts.weight_vram_gb = weights_bytes / GIB
    return facts


def describe_embedding(facts: Quantization, embedding_bytes: int) -> Quantization:
    """Adds a note about the copy of the token embeddings that `gpu_embedding` made. embedding_bytes: 0 without one."""
    if embedding_bytes:
        facts.notes.append(f"token embeddings ({embedding_bytes / 1024**2:.0f} MiB) were copied to the GPU for scoring")
    return facts


# ---------------------------------------------------------------------- out of memory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether CUDA ran out of memory: PyTorch has a type for it, an engine's own allocations only say so."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    )


def release_memory() -> None:
    """Returns PyTorch's cached memory to the GPU, so that a smaller batch finds room."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
