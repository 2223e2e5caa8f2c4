"""Mixtures of experts on a GPU, each against its decoded twin; deselected elsewhere.

    pytest -m gpu tests/gpu/test_mixtures_gpu.py              # vLLM; -k qwen3-moe for one family
    pytest -m gpu tests/gpu/test_mixtures_gpu.py -k exl3      # ExLlamaV3, whose converter runs on the GPU too

The checkpoints are random and made here (tests/architectures/mixtures.py), in the layouts of published ones. A twin
holds the weights that `lmeval_ext.decoding` reads from the quantized checkpoint. Transformers scores it in float32 and
writes the reference, against which the engine is measured with the quantized checkpoint, and once with the twin itself.
The last measurement is the floor: the twin in bfloat16 differs from the reference by the rounding of weights and
activations alone, and so does a kernel that multiplies the right weights (tests/architectures/rounding.py).
`LMEVAL_EXT_GPU_RESULTS` names a folder that keeps the result files. Without a GPU, the tests of vLLM that its CPU build
can run, run.
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.architectures.mixtures import FAMILIES, make_dense, quantize
from tests.architectures.rounding import beyond_rounding

ON_GPU = torch.cuda.is_available()
TASK = {"eval_len": 256, "stride": 256}
LIMIT = 8
# Set rather than profiled: several of these processes may share the GPU
VLLM = {
    "dtype": "bfloat16", "max_model_len": 384, "max_num_batched_tokens": 2048, "enforce_eager": True,
    "gpu_memory_utilization": 0.04, "kv_cache_memory_bytes": 1 << 28,
}  # fmt: skip
EMULATED = {"moe_backend": "emulation", "linear_backend": "emulation"}
MARLIN = {"moe_backend": "marlin", "linear_backend": "marlin"}


@dataclass(frozen=True)
class Run:
    """One engine. kernel: expression for the experts' kernel in the result (of a dense family, the linear layers').

    quantized: whether the kernels quantize activations. note: a part of the notes, if the checkpoint asks for it.
    median: divergence on a CPU (NVFP4: the project's emulated kernels, in float32; FP8: PyTorch's scaled product).
    """

    family: str
    scheme: str
    kernel: str
    arguments: dict[str, Any] = field(default_factory=dict)
    quantized: bool = False
    note: str | None = None
    median: float | None = None
    on_cpu: str | None = None  # the kernel on a CPU; None: vLLM's CPU build refuses it, or has no such backend

    @property
    def name(self) -> str:
        backend = self.arguments.get("moe_backend") or self.arguments.get("linear_backend")
        return "-".join(filter(None, (self.family, self.scheme, backend)))


WEIGHT_ONLY = "weight-only: "
RUNS = (
    Run("qwen3-moe", "NVFP4A16", "MarlinExperts", on_cpu="reference experts"),
    Run("qwen3-moe", "FP8_DYNAMIC", "(Triton|Cutlass)", quantized=True, note="natively"),
    Run("qwen3-moe", "NVFP4", "MarlinExperts", note=WEIGHT_ONLY),
    Run("qwen3-moe", "NVFP4", "Nvfp4QuantizationEmulation", EMULATED, quantized=True, note="emulated", median=0.0409),
    Run("qwen3-moe", "FP8_DYNAMIC", "MarlinExperts", MARLIN, note=WEIGHT_ONLY),
    Run("gpt-oss", "MXFP4", "MarlinExperts", {"moe_backend": "marlin"}),
    Run("deepseek-v3", "NVFP4A16", "MarlinExperts", on_cpu="reference experts"),
    Run("deepseek-v3", "FP8_BLOCK", "(Triton|Cutlass)", quantized=True, note="natively"),
    Run("deepseek-v3", "NVFP4", "Nvfp4QuantizationEmulation", EMULATED, quantized=True, note="emulated", median=0.1129),
    Run("deepseek-v3", "FP8_BLOCK", "MarlinExperts", MARLIN, note=WEIGHT_ONLY),
    Run("gemma3", "NVFP4A16", "MarlinNvFp4LinearKernel", on_cpu="reference"),
    Run("gemma3", "FP8_DYNAMIC", "CutlassFP8ScaledMMLinearKernel", quantized=True, note="natively", median=0.0122),
    Run("gemma3", "NVFP4", "EmulationNvFp4LinearKernel", {"linear_backend": "emulation"}, quantized=True,
        note="emulated", median=0.1551),
    # Last: OpenAI's Triton kernels, which need the Triton that vLLM was built with
    Run("gpt-oss", "MXFP4", "(OAITriton|Marlin)"),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def hook() -> None:
    from lmeval_ext import _hook

    _hook.install()  # a GPU host may have no installed package


class Checkpoints:
    """Checkpoints, their twins and their references, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._floors: dict[tuple[str, str], dict[str, Any]] = {}

    def dense(self, family: str) -> Path:
        path = self.folder / f"{family}-BF16"
        return path if path.exists() else make_dense(path, family)

    def quantized(self, family: str, scheme: str) -> tuple[Path, Path]:
        """(checkpoint, twin)."""
        path = self.folder / f"{family}-{scheme}"
        twin = path.with_name(path.name + "-decoded")
        if not path.exists():
            quantize(self.dense(family), path, family, scheme)
        return path, twin

    def reference(self, model: Path) -> str:
        """The store of Transformers in float32, on the CPU."""
        store = self.folder / "references" / model.name
        if not store.exists():
            label = f"{model.name}-float32"
            evaluated(
                "hf_quant", label, pretrained=str(model), dtype="float32", device="cpu", save_reference=str(store)
            )
        return str(store)

    def floor(self, family: str) -> dict[str, Any]:
        """The twin in vLLM, in bfloat16, against its own reference."""
        _, twin = self.quantized(family, FAMILIES[family].formats[0])
        return self._floor("vllm_nvfp4", twin, twin.name, **vllm_arguments({}))

    def exllama_floor(self, family: str, **engine: Any) -> dict[str, Any]:
        """The unquantized model in ExLlamaV3, in float16, against its own reference."""
        return self._floor("exllamav3", self.dense(family), f"{family}-FP16", **engine)

    def _floor(self, adapter: str, model: Path, label: str, **arguments: Any) -> dict[str, Any]:
        if (adapter, label) not in self._floors:
            reference = self.reference(model)
            self._floors[adapter, label] = evaluated(
                adapter, label, pretrained=str(model), reference=reference, **arguments
            )
        return self._floors[adapter, label]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("mixtures"))


def vllm_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    return {**VLLM, **arguments} if ON_GPU else {**VLLM, "dtype": "float32", **arguments}


def evaluated(adapter: str, label: str, **arguments: Any) -> dict[str, Any]:
    """The task's figures over the bundled text, with `quantization` and `divergence`; the result file is kept."""
    from tests.conftest import ROOT, evaluate

    result = evaluate(adapter, "sample_strided", limit=LIMIT, metadata=TASK, label=label, **arguments)
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
    if folder := os.environ.get("LMEVAL_EXT_GPU_RESULTS"):
        result.pop("samples", None)
        text = json.dumps(result, indent=2, default=str)
        for parent in (Path(arguments["pretrained"]).parent, ROOT):
            text = text.replace(f"{parent}/", "")
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"results_{label}.json").write_text(text, encoding="utf-8")
    figures = {key.removesuffix(",none"): value for key, value in result["results"]["sample_strided"].items()}
    print(label, {key: figures.get(key) for key in ("kld", "kld_median", "ppl_ratio", "top1_agreement")})
    return figures | {"facts": result["config"]["quantization"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_decoded_twin_in_bfloat16_differs_by_rounding(family: str, checkpoints: Checkpoints) -> None:
    floor = checkpoints.floor(family)
    assert floor["kld_median"] < 2e-3
    assert -1e-6 < floor["kld"] < 0.05
    assert floor["top1_agreement"] > 0.9
    assert floor["ppl_ratio"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_quantized_checkpoint_equals_its_decoded_twin(run: Run, checkpoints: Checkpoints) -> None:
    """A weight-only kernel within rounding; one that quantizes activations beyond it, and not by much."""
    if not ON_GPU and run.on_cpu is None:
        pytest.skip("vLLM's CPU build has no such kernel")
    model, twin = checkpoints.quantized(run.family, run.scheme)
    arguments = vllm_arguments(run.arguments)
    reference = checkpoints.reference(twin)
    found = evaluated("vllm_nvfp4", run.name, pretrained=str(model), reference=reference, **arguments)
    facts = found["facts"]
    assert re.search(run.kernel if ON_GPU else str(run.on_cpu), facts["kernel"])
    about_activations = [note for note in facts["notes"] if "activations" in note]
    assert bool(about_activations) == (run.note is not None)
    assert all(run.note in note for note in about_activations if run.note)
    floor = checkpoints.floor(run.family)
    if run.quantized:
        assert 2 * floor["kld_median"] < found["kld_median"] < 0.3
        if run.median is not None:
            assert found["kld_median"] == pytest.approx(run.median, rel=0.15)
        assert found["ppl_ratio"] == pytest.approx(1, abs=0.1)
    else:
        assert not beyond_rounding(found, floor)


# ------------------------------------------------------------------ ExLlamaV3


def converted(checkpoints: Checkpoints) -> Path:
    """The Qwen3 mixture at 4 bits per weight, by ExLlamaV3's converter."""
    target = checkpoints.folder / "qwen3-moe-EXL3-converted"
    command = [
        *(sys.executable, "-m", "exllamav3.conversion.convert_model", "-b", "4.0", "-cr", "16", "-cc", "512"),
        *("-i", str(checkpoints.dense("qwen3-moe")), "-o", str(target), "-w", str(checkpoints.folder / "exl3-work")),
    ]
    subprocess.run(command, check=True, timeout=240)
    return target


@pytest.mark.skipif(not ON_GPU, reason="ExLlamaV3 needs a GPU")
@pytest.mark.parametrize("source", ["random", "converted"])
def test_exl3_mixture_equals_its_decoded_twin(source: str, checkpoints: Checkpoints) -> None:
    """The floor is the unquantized mixture in ExLlamaV3, in float16. Our decoder reads both checkpoints."""
    model = converted(checkpoints) if source == "converted" else checkpoints.quantized("qwen3-moe", "EXL3")[0]
    engine = {"max_length": 512}
    floor = checkpoints.exllama_floor("qwen3-moe", **engine)
    found = evaluated("exllamav3", model.name, pretrained=str(model), reference=checkpoints.reference(model), **engine)
    assert -1e-6 < floor["kld"] < 0.02
    assert found["facts"]["engine"] == "exllamav3"
    assert found["facts"]["layer_bpw"] == pytest.approx(4.0, abs=0.3)
    assert not beyond_rounding(found, floor)
