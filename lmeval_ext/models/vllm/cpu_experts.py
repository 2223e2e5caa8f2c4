"""Emulated NVFP4 experts for CPUs, where vLLM has no kernel for them. Result files name them `reference experts`.

As for linear layers (cpu_kernel.py), weights are decoded once, at load; activations of a W4A4 checkpoint are quantized
and decoded at every call, under the scales of each expert, by vLLM's own emulation code. (vLLM's kernels take one scale
for all experts.) Each expert multiplies the tokens that were routed to it.

Tested with vLLM 0.32 (CPU): replaces `select_nvfp4_moe_backend`, `process_weights_after_loading` and `apply` of the two
methods in `_METHODS`. If one of these names is gone, vLLM refuses such checkpoints itself, or we do with a warning.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

logger = logging.getLogger(__name__)

_QUANTIZATION = "vllm.model_executor.layers.quantization"
_SELECT = "select_nvfp4_moe_backend"
# Module and class of the methods for experts, by layout of the checkpoint
_METHODS = (
    (
        f"{_QUANTIZATION}.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w4a4_nvfp4",
        "CompressedTensorsW4A4Nvfp4MoEMethod",
    ),
    (f"{_QUANTIZATION}.modelopt", "ModelOptNvFp4FusedMoE"),
)


class EmulatedExperts(NamedTuple):
    """Experts of one layer, decoded.

    w13: [experts, 2 · intermediate (1 · without a gate), hidden]. w2: [experts, hidden, intermediate]. Both in the
    compute dtype. a13, a2: [experts] factors by which inputs are multiplied before they become FP4; None if activations
    are not quantized.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    a13: torch.Tensor | None
    a2: torch.Tensor | None
    label: str = "reference experts"
    quantizes_activations: bool = True  # where the checkpoint asks for it

    @staticmethod
    def is_monolithic() -> bool:
        """Whether the experts do their own routing (vLLM's interface)."""
        return False

    def __call__(
        self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, activation: Any, on_input: bool
    ) -> torch.Tensor:
        """Sums the routed experts' outputs.

        x: [tokens, hidden]. topk_weights, topk_ids: [tokens, experts per token]. activation: function of
        [rows, 2 · intermediate] that returns [rows, intermediate]. on_input: weights multiply the input.
        """
        out = torch.zeros(x.shape, dtype=torch.float32)
        for expert in topk_ids.unique().tolist():
            token, place = (topk_ids == expert).nonzero(as_tuple=True)
            weight = topk_weights[token, place].unsqueeze(-1)
            rows = x[token] * weight.to(x.dtype) if on_input else x[token]
            hidden = activation(_quantized(rows, self.a13, expert) @ self.w13[expert].T)
            result = (_quantized(hidden, self.a2, expert) @ self.w2[expert].T).float()
            out.index_add_(0, token, result if on_input else result * weight)
        return out.to(x.dtype)


def _quantized(x: torch.Tensor, factors: torch.Tensor | None, expert: int) -> torch.Tensor:
    """Values [rows, width] through FP4 and back; unchanged without factors."""
    if factors is None:
        return x
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import ref_nvfp4_quant_dequant

    return ref_nvfp4_quant_dequant(x.contiguous(), factors[expert], block_size=16)


def register() -> None:
    """Offers the emulated experts for checkpoints that vLLM has no kernel for. Idempotent."""
    for module_name, class_name in _METHODS:
        try:
            module = importlib.import_module(module_name)
            method, select = getattr(module, class_name), getattr(module, _SELECT)
        except (ImportError, AttributeError) as error:  # another version of vLLM, which has to start nevertheless
            logger.warning("no emulated NVFP4 experts in this vLLM (%s): such checkpoints will not load here", error)
            continue
        if hasattr(select, "_lmeval_ext"):
            continue
        setattr(module, _SELECT, _or_emulated(select, module))
        method.process_weights_after_loading = _prepared(method.process_weights_after_loading)
        method.apply = _applied(method.apply)


def _or_emulated(select: Any, module: Any) -> Any:
    @functools.wraps(select)
    def selected(*args: Any, **kwargs: Any) -> Any:
        try:
            return select(*args, **kwargs)
        except (NotImplementedError, ValueError) as error:  # "No NvFp4 MoE backend supports …"
            logger.info("no NVFP4 kernel of vLLM runs experts here (%s); using the emulated ones", error)
            return module.NvFp4MoeBackend.EMULATION, EmulatedExperts

    selected._lmeval_ext = True  # type: ignore[attr-defined]
    return selected


def _is_emulated(method: Any) -> bool:
    return method.experts_cls is EmulatedExperts


def _prepared(original: Any) -> Any:
    @functools.wraps(original)
    def process_weights_after_loading(self: Any, layer: Any) -> None:
        if not _is_emulated(self):
            original(self, layer)
            return
        from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig

        if layer.expert_map is not None or getattr(layer, "w13_bias", None) is not None:
            raise NotImplementedError("emulated NVFP4 experts: expert parallelism and biases are not supported")
        gate = {"gemm1_alpha": "swiglu_alpha", "gemm1_beta": "swiglu_beta", "gemm1_clamp_limit": "swiglu_limit"}
        self.moe_quant_config = FusedMoEQuantConfig.make(**{k: getattr(layer, v, None) for k, v in gate.items()})
        self.fused_experts = decoded_experts(layer, self.use_a16)
        for name in [n for n, _ in layer.named_parameters(recurse=False) if n.startswith(("w13_", "w2_"))]:
            delattr(layer, name)

    return process_weights_after_loading


def _applied(original: Any) -> Any:
    @functools.wraps(original)
    def apply(
        self: Any, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, *others: Any,
        **named: Any,
    ) -> Any:  # fmt: skip
        if not _is_emulated(self):
            return original(self, layer, x, topk_weights, topk_ids, *others, **named)
        return self.fused_experts(
            x, topk_weights, topk_ids, _activation_of(layer, self), bool(layer.apply_router_weight_on_input)
        )

    return apply


def _activation_of(layer: Any, method: Any) -> Any:
    from vllm.model_executor.layers.fused_moe.activation import ApplyMoEActivationConfig, apply_moe_activation

    config = ApplyMoEActivationConfig.from_configs(method.moe, method.moe_quant_config)

    def activation(x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(len(x), x.shape[-1] // (2 if layer.activation.is_gated else 1))
        return apply_moe_activation(layer.activation, out, x.contiguous(), activation_config=config)

    return activation


def decoded_experts(layer: Any, use_a16: bool) -> EmulatedExperts:
    """Decodes the experts of a layer whose tensors have been loaded.

    compressed-tensors stores `w13_weight_packed` and divisors `…_global_scale`; ModelOpt `w13_weight` and factors
    `w13_weight_scale_2` and `w13_input_scale`.
    """
    packed = hasattr(layer, "w13_weight_packed")
    weights, inputs = [], []
    for name in ("w13", "w2"):
        stored = getattr(layer, f"{name}_weight_packed" if packed else f"{name}_weight").data
        scale = getattr(layer, f"{name}_weight_global_scale" if packed else f"{name}_weight_scale_2").data
        weights.append(_decoded(stored, getattr(layer, f"{name}_weight_scale").data, 1 / scale if packed else scale))
        if not use_a16:
            given = getattr(layer, f"{name}_input_global_scale" if packed else f"{name}_input_scale").data
            # The matrices of one product share their input: as for linear layers, the larger stored value counts
            per_expert = given.reshape(len(given), -1).amax(1).float()
            inputs.append(per_expert if packed else 1 / per_expert)
    return EmulatedExperts(weights[0], weights[1], *(inputs or (None, None)))


def _decoded(stored: torch.Tensor, scales: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Weights [experts, rows, columns] from packed values, scales per block, and factors per expert (and matrix)."""
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype

    def matrices() -> Iterator[torch.Tensor]:
        for values, blocks, factor in zip(stored, scales, factors.reshape(len(factors), -1), strict=True):
            rows = len(values) // len(factor)  # gate and up have a factor each
            yield torch.cat([
                dequantize_to_dtype(
                    values[i * rows : (i + 1) * rows].contiguous(),
                    blocks[i * rows : (i + 1) * rows].contiguous(),
                    factor[i],
                    torch.get_default_dtype(),
                    block_size=16,
                    swizzle=False,
                )
                for i in range(len(factor))
            ])  # fmt: skip

    return torch.stack(list(matrices()))
