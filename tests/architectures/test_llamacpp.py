"""Architectures as GGUF files through `llamacpp`: log-probabilities of a plain forward, and references across engines.

Where llama.cpp computes something else than the model's own code, the plain forward is changed in the same way: what
differs is known then, and nothing else does.
"""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.registry import get_model

from lmeval_ext.divergence.store import ReferenceStore
from lmeval_ext.models.llamacpp.deviations import DEVIATIONS
from lmeval_ext.storage.kv_cache import kv_cache
from tests.architectures import checkpoints
from tests.architectures.checkpoints import ARCHITECTURES, windows
from tests.architectures.conftest import (
    Checkpoint,
    assert_equal_logprobs,
    assert_no_divergence,
    measure,
    requests,
)
from tests.architectures.gguf_files import write_gguf

pytestmark = [pytest.mark.engine, pytest.mark.slow]

# What llama.cpp has no graph for, or no scaling of positions (dynamic)
MISSING = {"llama-dynamic", "opt-projected"}


def gelu_by_table(model: Any) -> None:
    """On a CPU, llama.cpp reads GELU from a table: its input and output are float16 (ggml-cpu/vec.h)."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()

    for module in model.modules():
        for name, child in list(module.named_children()):
            if "GELU" in type(child).__name__:
                setattr(module, name, Function(rounded))


class Function(torch.nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def ends_of_yarn_on_whole_dimensions(model: Any) -> None:
    """gpt-oss was trained with `truncate=False`, for which llama.cpp has no metadata (ggml_rope_yarn_corr_dims)."""
    config = model.config
    config.rope_parameters = {**config.rope_parameters, "truncate": True}
    model.model.rotary_emb = type(model.model.rotary_emb)(config)


def no_window(model: Any) -> None:
    """llama.cpp's StarCoder 2 attends to all tokens (src/models/starcoder2.cpp)."""
    model.config.sliding_window = None
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None


def no_epsilon(model: Any) -> None:
    """llama.cpp's Qwen2-VL does not read the epsilon of its norms, and takes 0 (src/models/qwen2vl.cpp, 0.3.36)."""
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.0


DIFFERENCES: dict[str, Callable[[Any], None]] = {
    "gemma2": gelu_by_table, "gemma3": gelu_by_table, "gemma3-wrapper": gelu_by_table, "gpt2": gelu_by_table,
    "phi": gelu_by_table, "gpt-oss": ends_of_yarn_on_whole_dimensions, "qwen2.5-vl": no_epsilon,
    "starcoder2": lambda model: (no_window(model), gelu_by_table(model)),
}  # fmt: skip


def errors(scores: Sequence[Any], expected: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.abs(s.logprobs - e) for s, e in zip(scores, expected, strict=True)])


def load(path: Path, **arguments: Any) -> Any:
    return get_model("llamacpp")(
        pretrained=str(path), type_k="f32", type_v="f32", n_threads=1, n_threads_batch=1, max_length=256, **arguments
    )


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in MISSING])
def test_gguf_has_the_log_probabilities_of_a_plain_forward(
    name: str, checkpoint: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    made = checkpoint(name)
    path = write_gguf(made.folder, tmp_path / "model.gguf")
    model = load(path)
    scores = model.score_checked(requests())
    if difference := DIFFERENCES.get(name):
        changed = copy.deepcopy(made.plain.args[0])  # type: ignore[attr-defined]
        difference(changed)
        after = errors(scores, [checkpoints.logprobs(changed, ids) for ids in windows()])
        # The table of GELU is of float16: a number near the border between two entries takes either
        assert after.mean() < 1e-4
        assert after.max() < 1e-3
        before = errors(scores, made.expected)
        noted = DEVIATIONS.get(model.llama.metadata["general.architecture"])
        assert noted is None or noted in model.describe().notes
        assert before.mean() > 5 * after.mean(), "no difference any more: take it out here and in docs/harness.md"
        return
    assert_equal_logprobs(scores, made.expected)
    assert_no_divergence(measure(model, made.store), made.expected)
    written = load(path, save_reference=str(tmp_path / "store"))
    written.score_checked(requests())
    assert ReferenceStore.open(str(tmp_path / "store")).manifest.mode == "logits"
    for found in made.measure(str(tmp_path / "store")):
        assert np.abs((found.divergence or {})["kld"]).max() < 1e-6


# In a process of its own: the adapter's log callback, once set, stays for the whole process
ALLOCATE = """
import sys, llama_cpp
for path in sys.argv[1:]:
    print("FILE", path, file=sys.stderr, flush=True)
    llama_cpp.Llama(path, n_ctx=4096, n_batch=512, n_ubatch=512, swa_full=False, n_gpu_layers=0, verbose=True).close()
"""
SIZE = re.compile(r"(llama_kv_cache|llama_memory_recurrent): size = +([\d.]+) MiB \( *(\d+) cells")


def test_caches_have_the_bytes_that_llama_cpp_allocates(
    checkpoint: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    names = [name for name in ARCHITECTURES if name not in MISSING]
    paths = {str(write_gguf(checkpoint(name).folder, tmp_path / f"{name}.gguf")): name for name in names}
    command = [sys.executable, "-c", ALLOCATE, *paths]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    for part in log.split("FILE ")[1:]:
        path = part.split("\n", 1)[0]
        found = kv_cache(path)
        allocated: dict[str, list[tuple[float, int]]] = {"llama_kv_cache": [], "llama_memory_recurrent": []}
        for kind, mib, cells in SIZE.findall(part):
            allocated[kind].append((float(mib), int(cells)))
        caches = [(mib, cells) for mib, cells in allocated["llama_kv_cache"] if mib]
        assert found.exact, paths[path]
        expected = [size * cells / 1024**2 for (size, _), (_, cells) in zip(found.groups or (), caches, strict=True)]
        assert [mib for mib, _ in caches] == pytest.approx(expected, abs=0.006), paths[path]
        states = sum(mib for mib, _ in allocated["llama_memory_recurrent"])
        assert states == pytest.approx(found.state_bytes / 1024**2, abs=0.006), paths[path]
