"""Which kernels a loaded model runs on, and whether they quantize activations; runs inside vLLM's workers.

Linear layers (`LinearBase`) and routed experts (`RoutedExperts` in vLLM 0.32, `FusedMoE` before) keep their
quantization in `quant_method` or `scheme`, and the kernel in one of its attributes. Checkpoints of mixed precision have
layers of several kinds, so each kind is reported. Names are those of vLLM 0.26 to 0.33.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from lmeval_ext.models.vllm.kernels import Activations, quantizes_activations

_CHOSEN = "lmeval_ext_chosen"
# What a quantization asks for, by the name of its class, where no attribute says it: the first match counts
_ASKED: tuple[tuple[str, bool], ...] = (
    (r"A16|AWQ|GPTQ|GptOss|^Mxfp4MoE|Int4|BitsAndBytes", False),
    (r"A[48]|Fp8|MxFp8|Mxfp8|NvFp4|Nvfp4|Int8", True),
)


def layer_kernels(model: Any) -> dict[str, Activations]:
    """Kernels (or quantization methods) of a model's quantized layers, by name."""
    from vllm.model_executor.layers.linear import LinearBase

    found: set[tuple[str, Activations]] = set()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is None:
            continue
        if _holds_experts(module):
            found |= _experts_kernel(method)
        elif isinstance(module, LinearBase):  # attention and embeddings have methods too, but are not quantized layers
            found |= _linear_kernels(module, method)
    return merged(found)


def watch_choices(model: Any) -> None:
    """Records from now on which kernel each `FallbackExperts` takes, which it decides anew at every call. Idempotent.

    Such experts hold two kernels: `TritonOrCutlassExperts`, `TritonOrDeepGemmExperts`. Replayed CUDA graphs decide
    nothing: where no choice was recorded, the result names the pair.
    """
    for module in model.modules():
        kernel = _built_kernel(getattr(module, "quant_method", None))
        choose = getattr(kernel, "_select_experts_impl", None)
        if kernel is None or choose is None or hasattr(kernel, _CHOSEN):
            continue
        setattr(kernel, _CHOSEN, {})
        kernel._select_experts_impl = partial(_recorded_choice, choose, getattr(kernel, _CHOSEN))


def _recorded_choice(choose: Callable[..., Any], chosen: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
    kernel = choose(*arguments, **keywords)
    chosen[_name(kernel)] = kernel
    return kernel


def merged(kernels: Iterable[tuple[str, Activations]]) -> dict[str, Activations]:
    """One entry per name, in order: asked if any layer asks for it, unknown if that is unknown of one."""
    table: dict[str, Activations] = {}
    for name, (asked, ran) in sorted(kernels, key=lambda kernel: kernel[0]):
        before = table.get(name, Activations(False, ran))
        both = True if True in (asked, before.asked) else None if None in (asked, before.asked) else False
        table[name] = Activations(both, ran if ran is before.ran else None)
    return table


def _holds_experts(module: Any) -> bool:
    return any(base.__name__ in ("RoutedExperts", "FusedMoE") for base in type(module).__mro__)


def _linear_kernels(module: Any, method: Any) -> set[tuple[str, Activations]]:
    holders = [h for h in (getattr(module, "scheme", None), method) if h is not None]
    kernels = [v for h in holders for v in vars(h).values() if _is_kernel(v)]
    if not kernels and type(method).__name__.startswith("Unquantized"):
        return set()
    return {_layer_kernel(kernel, _name(kernel), holders) for kernel in kernels or holders[:1]}


def _built_kernel(method: Any) -> Any:
    """The object that multiplies experts; None before it is built, and where the method itself multiplies."""
    kernel = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
    return getattr(method, "fused_experts", None) if kernel is None else kernel


def _experts_kernel(method: Any) -> set[tuple[str, Activations]]:
    """The kernels of experts: the classes that multiply them, else the name of the backend that was selected."""
    if type(method).__name__.startswith("Unquantized"):
        return set()
    inner = getattr(method, "old_quant_method", method)  # `FusedMoEModularMethod` wraps the checkpoint's own method
    kernel = _built_kernel(method)
    kernels = {} if kernel is None else getattr(kernel, _CHOSEN, None) or {_name(kernel): kernel}
    if not kernels:
        chosen = [v for v in vars(inner).values() if _is_backend(v)]
        kernels = {str(chosen[0]) if chosen else _name(inner): None}
    config = getattr(method, "moe_quant_config", None) or getattr(inner, "moe_quant_config", None)
    asked = _asked(inner, [inner])
    return {(name, Activations(asked, _experts_ran(name, kernel, config))) for name, kernel in kernels.items()}


def _experts_ran(name: str, kernel: Any, config: Any) -> bool | None:
    """Whether a kernel of experts quantizes activations. config: of the method, which gives their quantized dtype."""
    ran: bool | None = getattr(kernel, "quantizes_activations", None)  # ours says so itself
    ran = quantizes_activations(name) if ran is None else ran
    return config.quant_dtype is not None if ran is None and config is not None else ran


def _layer_kernel(kernel: Any, name: str, holders: list[Any]) -> tuple[str, Activations]:
    ran = getattr(kernel, "quantizes_activations", None)
    return name, Activations(_asked(kernel, holders), quantizes_activations(name) if ran is None else ran)


def _asked(kernel: Any, holders: list[Any]) -> bool | None:
    """Whether a layer's quantization asks for quantized activations."""
    for holder in holders:
        if hasattr(holder, "use_a16"):
            return not holder.use_a16
        if hasattr(holder, "input_quant"):
            return holder.input_quant is not None
        if hasattr(getattr(holder, "spec", None), "activation"):  # ModelOpt
            return holder.spec.activation is not None
    config: Any = getattr(kernel, "config", None)
    if hasattr(config, "activation_quant_key"):
        return config.activation_quant_key is not None
    if hasattr(config, "act_type"):  # integer weights of 2 to 8 bits
        return bool(config.act_type.itemsize == 1)
    for holder in holders:
        for pattern, asked in _ASKED:
            if re.search(pattern, type(holder).__name__):
                return asked
    return None


def _is_kernel(value: Any) -> bool:
    return any("Kernel" in base.__name__ for base in type(value).__mro__)


def _is_backend(value: Any) -> bool:
    """One of vLLM's enumerations of backends for experts, such as `NvFp4MoeBackend.MARLIN`."""
    return type(value).__name__.endswith("Backend")


def _name(kernel: Any) -> str:
    return getattr(kernel, "label", None) or type(kernel).__name__
