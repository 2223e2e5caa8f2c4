"""What runs inside vLLM's workers, next to the weights, through vLLM's `worker_extension_cls`.

Methods are called by name with `LLM.collective_rpc`; names carry our prefix, since vLLM mixes this class into
its own worker. Tried with vLLM 0.26 (GPU) and 0.32 (CPU).
"""

from __future__ import annotations

from typing import Any


class WorkerReport:
    """Facts that only a worker knows."""

    model_runner: Any  # vLLM's worker has it

    def lmeval_ext_report(self) -> dict[str, Any]:
        """kernels: names of the kernels (or quantization methods) of the model's linear layers, sorted.

        dtype: of the weights that are not quantized. kv_pool_bytes: preallocated KV cache. peak_bytes: most GPU
        memory allocated so far, None on a CPU.
        """
        import torch

        runner = self.model_runner
        # hybrid models' layers are views of one buffer: each storage counts once
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(runner.kv_caches)}
        pool = sum(storages.values())
        cuda = torch.cuda.is_available()
        return {
            "kernels": sorted(_kernels(runner.get_model() if hasattr(runner, "get_model") else runner.model)),
            "dtype": str(runner.model_config.dtype).removeprefix("torch."),
            "kv_pool_bytes": pool,
            "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        }


def _kernels(model: Any) -> set[str]:
    from vllm.model_executor.layers.linear import LinearBase

    names: set[str] = set()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is None or not (isinstance(module, LinearBase) or "MoE" in type(module).__name__):
            continue  # attention and embeddings have methods too, but no weights of a quantized layer
        holders = [h for h in (getattr(module, "scheme", None), method) if h is not None]
        found = {_name(v) for h in holders for v in vars(h).values() if _is_kernel(v)}
        unquantized = type(method).__name__.startswith("Unquantized")
        names |= found or (set() if unquantized else {type(holders[0]).__name__})
    return names


def _is_kernel(value: Any) -> bool:
    return any("Kernel" in base.__name__ for base in type(value).__mro__)


def _name(kernel: Any) -> str:
    return getattr(kernel, "label", None) or type(kernel).__name__


def _tensors(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return [t for part in tree for t in _tensors(part)]
    return [tree] if hasattr(tree, "nbytes") else []
