"""The recorded results of tests/gpu/test_mixtures_gpu.py: bounds tell rounding from an error, `compare` marks them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from compare.comparison.build import build_comparison
from compare.comparison.comparison import Options
from compare.results.reading import read_results
from tests.architectures.rounding import beyond_rounding
from tests.conftest import ROOT

FOLDER = ROOT / "docs" / "results" / "mixtures-h100"
FLOORS = {
    ("qwen3-moe", "vllm"): "qwen3-moe-NVFP4A16-decoded",
    ("gpt-oss", "vllm"): "gpt-oss-MXFP4-decoded",
    ("deepseek-v3", "vllm"): "deepseek-v3-NVFP4A16-decoded",
    ("gemma3", "vllm"): "gemma3-NVFP4A16-decoded",
    ("qwen3-moe", "exllamav3"): "qwen3-moe-FP16",
}
# Label: kernel of the experts (Gemma has none: of the linear layers), and whether it quantizes activations
RUNS = {
    "qwen3-moe-NVFP4A16": ("MarlinExperts", False),
    "qwen3-moe-NVFP4": ("MarlinExperts", False),
    "qwen3-moe-NVFP4-emulation": ("Nvfp4QuantizationEmulationTritonExperts", True),
    "qwen3-moe-FP8_DYNAMIC": ("TritonOrCutlassExperts", True),
    "qwen3-moe-FP8_DYNAMIC-marlin": ("MarlinExperts", False),
    "qwen3-moe-EXL3": ("exl3", False),
    "qwen3-moe-EXL3-converted": ("exl3", False),
    "gpt-oss-MXFP4": ("OAITritonMxfp4ExpertsMonolithic", False),
    "gpt-oss-MXFP4-marlin": ("MarlinExperts", False),
    "deepseek-v3-NVFP4A16": ("MarlinExperts", False),
    "deepseek-v3-NVFP4-emulation": ("Nvfp4QuantizationEmulationTritonExperts", True),
    "deepseek-v3-FP8_BLOCK": ("TritonExperts", True),
    "deepseek-v3-FP8_BLOCK-marlin": ("MarlinExperts", False),
    "gemma3-NVFP4A16": ("MarlinNvFp4LinearKernel", False),
    "gemma3-NVFP4-emulation": ("EmulationNvFp4LinearKernel", True),
    "gemma3-FP8_DYNAMIC": ("CutlassFP8ScaledMMLinearKernel", True),
}
WEIGHT_ONLY_MARKS = {"qwen3-moe-NVFP4", "qwen3-moe-FP8_DYNAMIC-marlin", "deepseek-v3-FP8_BLOCK-marlin"}


def recorded(label: str) -> tuple[dict[str, float], dict[str, Any]]:
    """(figures, quantization) of one result."""
    content = json.loads((FOLDER / f"results_{label}.json").read_text())
    figures = {key.removesuffix(",none"): value for key, value in content["results"]["sample_strided"].items()}
    return figures, content["config"]["quantization"]


@pytest.mark.parametrize("label", RUNS)
def test_bounds_separate_rounding_from_quantized_activations(label: str) -> None:
    kernel, quantized = RUNS[label]
    figures, facts = recorded(label)
    assert kernel in facts["kernel"].replace("+", ", ").split(", ")
    assert any(note.startswith("activations quantized by") for note in facts["notes"]) is quantized
    (family,) = {family for family, _ in FLOORS if label.startswith(family)}
    floor, _ = recorded(FLOORS[family, facts["engine"]])
    assert bool(beyond_rounding(figures, floor)) is quantized


def test_a_fault_in_one_expert_exceeds_the_bounds() -> None:
    """A fault that only a quarter of the tokens meet, which leaves the median as it is."""
    figures, _ = recorded("qwen3-moe-EXL3")
    floor, _ = recorded("qwen3-moe-FP16")
    assert beyond_rounding(figures, floor) == []
    assert len(beyond_rounding(figures | {"kld_p90": 3e-3}, floor)) == 1
    assert len(beyond_rounding(figures | {"kld": figures["kld"] + 3e-3 / 4}, floor)) == 0
    assert len(beyond_rounding(figures | {"kld": figures["kld"] + 0.04 / 4}, floor)) == 1
    assert len(beyond_rounding(dict.fromkeys(figures, float("nan")), floor)) == 4


def test_compare_marks_weight_only_runs_and_keeps_models_and_references_apart() -> None:
    records = read_results([FOLDER]).records
    assert {r.label for r in records if r.quantization.runs_other_than_named} == WEIGHT_ONLY_MARKS
    assert {r.quantization.architecture for r in records} == {"qwen3_moe", "gpt_oss", "deepseek_v3", "gemma3"}
    by_model: dict[int | None, set[str]] = {}
    for point in build_comparison(records, Options()).points:
        by_model.setdefault(point.size, set()).add(point.record.quantization.architecture)
    assert sorted(map(len, by_model.values())) == [1, 1, 1, 1]
    points = build_comparison(records, Options(metrics=("kld",))).points
    references: dict[int, set[str | None]] = {}
    for point in points:
        assert point.record.divergence is not None
        references.setdefault(point.group, set()).add(point.record.divergence.reference.id)
    assert all(len(ids) == 1 for ids in references.values())
