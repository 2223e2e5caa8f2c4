"""Which kernels the result names, and what it says of the activations: by what the layers of a loaded model hold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmeval_ext.models.vllm.kernels import Activations, activation_notes, quantizes_activations
from lmeval_ext.models.vllm.layer_kernels import merged


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("MarlinNvFp4LinearKernel", False),
        ("HummingNvFp4LinearKernel", False),
        ("B12xNvFp4W4A16LinearKernel", False),
        ("FlashInferCuteDslNvFp4W4A16LinearKernel", False),
        ("MarlinFP8ScaledMMLinearKernel", False),
        ("CPUFp8PerTensorScaledMMLinearKernel", False),
        ("EmulationMxfp8LinearKernel", False),
        ("MarlinExperts", False),
        ("BatchedHummingGroupedExperts", False),
        ("NvFp4MoeBackend.MARLIN", False),
        ("EmulationNvFp4LinearKernel", True),
        ("CutlassNvFp4LinearKernel", True),
        ("TorchNvFp4LinearKernel", True),
        ("CutlassFP8ScaledMMLinearKernel", True),
        ("CPUFP8W8A8ScaledMMLinearKernel", True),
        ("Nvfp4QuantizationEmulationTritonExperts", True),
        ("TrtLlmNvFp4ExpertsModular", True),
        ("CutlassExpertsFp4", True),
        ("TritonExperts", None),
        ("KernelOfNextYear", None),
    ],
)
def test_kernel_is_known_by_its_name(name: str, expected: bool | None) -> None:
    assert quantizes_activations(name) is expected


def test_notes_follow_what_kernels_did_to_each_kind_of_layer() -> None:
    """A checkpoint of FP8 and NVFP4 layers, one of which lost its activations; no note where none were asked for."""
    mixed = {"CutlassFP8ScaledMMLinearKernel": Activations(True, True), "MarlinExperts": Activations(True, False)}
    weight_only, native = activation_notes(mixed)
    assert weight_only.startswith("weight-only: MarlinExperts does not quantize activations")
    assert native == "activations quantized by CutlassFP8ScaledMMLinearKernel, natively"
    assert activation_notes({"MarlinNvFp4LinearKernel": Activations(False, False)}) == []
    both = {"reference": Activations(True, True), "reference experts": Activations(True, True)}
    assert activation_notes(both) == ["activations quantized by reference, reference experts, emulated"]
    (unknown,) = activation_notes({"KernelOfNextYear": Activations(True, None)})
    assert unknown.startswith("unknown whether activations are quantized")


def test_layers_of_one_kernel_are_merged() -> None:
    """Asked for if any layer asks for it; unknown rather than guessed."""
    a16, w4a4 = Activations(False, False), Activations(True, False)
    assert merged([("Marlin", a16), ("Marlin", w4a4)]) == {"Marlin": Activations(True, False)}
    assert merged([("X", Activations(None, None)), ("X", a16)]) == {"X": Activations(None, None)}
    assert merged([]) == {}


# ------------------------------------------------------------------ layers as vLLM makes them


def root_with(module: torch.nn.Module, **attributes: Any) -> torch.nn.Module:
    for name, value in attributes.items():
        object.__setattr__(module, name, value)
    root = torch.nn.Module()
    root.add_module("layer", module)
    return root


def blank(kind: type[torch.nn.Module]) -> torch.nn.Module:
    """An object of a class of layers, without the weights that its constructor makes."""
    module = kind.__new__(kind)
    torch.nn.Module.__init__(module)
    return module


@pytest.mark.engine
@pytest.mark.parametrize("use_a16", [False, True])
@pytest.mark.parametrize(("backend", "ran"), [("MARLIN", False), ("EMULATION", True), ("HUMMING", False)])
def test_experts_are_named_by_the_backend_that_was_selected(backend: str, ran: bool, use_a16: bool) -> None:
    """vLLM 0.32's `RoutedExperts`, and `FusedMoE` before it, with the method of a compressed-tensors checkpoint."""
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_nvfp4 as nvfp4,
    )

    from lmeval_ext.models.vllm.worker import _kernels

    method = nvfp4.CompressedTensorsW4A4Nvfp4MoEMethod.__new__(nvfp4.CompressedTensorsW4A4Nvfp4MoEMethod)
    method.nvfp4_backend, method.use_a16 = NvFp4MoeBackend[backend], use_a16
    older = type("FusedMoE", (torch.nn.Module,), {})
    for module in (blank(RoutedExperts), older()):
        kernels = _kernels(root_with(module, quant_method=method))
        assert kernels == {f"NvFp4MoeBackend.{backend}": Activations(not use_a16, ran)}
        notes = activation_notes(kernels)
        assert bool(notes) is not use_a16
        assert any("weight-only" in note for note in notes) is (not ran and not use_a16)


@pytest.mark.engine
def test_experts_are_named_by_the_class_that_multiplies_them() -> None:
    """The kernel that was built counts; what it does to activations is in its configuration."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from lmeval_ext.models.vllm.worker import _kernels

    class Fp8MoEMethod:  # vLLM's name; its constructor needs a GPU
        moe_kernel = SimpleNamespace(fused_experts=type("TritonExperts", (), {})())

    for quant_dtype, ran in ((torch.float8_e4m3fn, True), (None, False)):
        method = Fp8MoEMethod()
        method.moe_quant_config = FusedMoEQuantConfig.make(quant_dtype)  # type: ignore[attr-defined]
        kernels = _kernels(root_with(blank(RoutedExperts), quant_method=method))
        assert kernels == {"TritonExperts": Activations(True, ran)}


@pytest.mark.engine
def test_experts_with_a_fallback_are_named_by_the_kernel_that_ran() -> None:
    """vLLM's `FallbackExperts` decide at every call; the pair is named where no call was seen."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
    from vllm.model_executor.layers.fused_moe.experts.fallback import FallbackExperts
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from lmeval_ext.models.vllm.layer_kernels import watch_choices
    from lmeval_ext.models.vllm.worker import _kernels

    class TritonOrCutlassExperts(FallbackExperts):  # vLLM's own imports a library of GPUs
        def __init__(self, *experts: Any) -> None:
            self.experts, self.fallback_experts = experts

        def _select_experts_impl(self, hidden_states: Any, w1: Any, w2: Any) -> Any:
            return self.fallback_experts if hidden_states < 8 else self.experts

    TritonOrCutlassExperts.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]

    class CutlassExpertsFp8(SimpleNamespace): ...

    class TritonExperts(SimpleNamespace): ...

    cutlass, triton = CutlassExpertsFp8(apply=lambda *_: None), TritonExperts(apply=lambda *_: None)
    experts: Any = TritonOrCutlassExperts(cutlass, triton)
    method = SimpleNamespace(
        moe_kernel=SimpleNamespace(fused_experts=experts),
        moe_quant_config=FusedMoEQuantConfig.make(torch.float8_e4m3fn),
        input_quant="fp8",
    )
    model = root_with(blank(RoutedExperts), quant_method=method)
    native = Activations(True, True)
    watch_choices(model)
    assert _kernels(model) == {"TritonOrCutlassExperts": native}
    experts.apply(None, 2048, *[None] * 13)
    watch_choices(model)
    assert _kernels(model) == {"CutlassExpertsFp8": native}
    experts.apply(None, 4, *[None] * 13)
    assert _kernels(model) == {"CutlassExpertsFp8": native, "TritonExperts": native}


@pytest.mark.engine
def test_linear_layers_say_what_each_scheme_asks_for() -> None:
    """compressed-tensors' NVFP4 with and without activations, ModelOpt's, FP8, INT8, and 4-bit integers."""
    from vllm.model_executor.layers.linear import LinearBase

    from lmeval_ext.models.vllm.worker import _kernels

    def kernel(name: str, **config: Any) -> Any:
        return type(name, (), {"config": SimpleNamespace(**config)})()

    def kernels_of(name: str, method: str, config: dict[str, Any], **attributes: Any) -> Any:
        held = type(method, (), {})()
        vars(held).update(attributes | {"kernel": kernel(name, **config)})
        return _kernels(root_with(blank(LinearBase), quant_method=held))

    marlin = "MarlinNvFp4LinearKernel"
    assert kernels_of(marlin, "W4A4", {}, use_a16=False) == {marlin: Activations(True, False)}
    assert kernels_of(marlin, "W4A4", {}, use_a16=True) == {marlin: Activations(False, False)}
    for activation, asked in ((None, False), ("nvfp4", True)):
        spec = SimpleNamespace(activation=activation)
        assert kernels_of(marlin, "ModelOptLinearMethod", {}, spec=spec) == {marlin: Activations(asked, False)}
    fp8, int8, machete = "CutlassFP8ScaledMMLinearKernel", "CutlassInt8ScaledMMLinearKernel", "MacheteLinearKernel"
    assert kernels_of(fp8, "X", {"activation_quant_key": "key"}) == {fp8: Activations(True, True)}
    assert kernels_of(int8, "CompressedTensorsW8A8Int8", {}) == {int8: Activations(True, True)}
    assert kernels_of(machete, "X", {"act_type": torch.bfloat16}) == {machete: Activations(False, False)}


@pytest.mark.engine
def test_vllm_still_has_the_names_of_the_emulated_experts() -> None:
    """cpu_experts.py replaces these; where one is gone, NVFP4 experts do not load on a CPU."""
    import importlib

    from lmeval_ext.models.vllm import cpu_experts

    cpu_experts.register()
    for module_name, class_name in cpu_experts._METHODS:
        module = importlib.import_module(module_name)
        method = getattr(module, class_name)
        assert hasattr(getattr(module, cpu_experts._SELECT), "_lmeval_ext")
        assert method.apply.__wrapped__
        assert method.process_weights_after_loading.__wrapped__
