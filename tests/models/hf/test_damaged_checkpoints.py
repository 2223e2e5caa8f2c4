"""One tensor renamed, dropped or added: `hf_quant` gives the right scores or one line, never other scores."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from lm_eval.api.registry import get_model
from safetensors.torch import load_file, save_file

from lmeval_ext.errors import UserError
from tests.conftest import VOCABULARY, make_llama
from tests.models.hf.tiny_checkpoints import MAKERS, Tensors, missing_packages
from tests.models.test_adapters import windows

pytestmark = pytest.mark.engine

# Other names that a tensor of a quantization has somewhere
NAMES = (
    "weight", "bias", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "weight_zero_point",
    "weight_packed", "input_scale", "input_global_scale", "activation_scale", "scales", "qzeros", "qweight", "g_idx",
    "weight.absmax", "weight.quant_map", "SCB", "codes", "codebooks",
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("damaged") / "dense", vocabulary=VOCABULARY)


def scores(folder: Path) -> np.ndarray:
    model = get_model("hf_quant")(pretrained=str(folder), dtype="float32", device="cpu")
    return np.array([s.logprobs for s in model._loglikelihood_tokens(windows(1, length=24, context=1))])


def damages(tensors: Tensors, every: bool) -> Iterator[tuple[str, Tensors]]:
    """(what was done, tensors) for the tensors of a matrix; every: of two, a norm and the head, under many names."""
    places = r"layers\.0\.(self_attn\.q_proj|mlp\.down_proj|input_layernorm)\.|lm_head|embed_tokens"
    some = [name for name in tensors if re.search(places if every else r"layers\.1\.mlp\.down_proj\.", name)]
    for name in some:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        yield f"drop {name}", rest
        module = re.match(r"(.*?(_proj|norm|lm_head|embed_tokens))\.", name)[1]  # type: ignore[index]
        others = [f"{module}.{other}" for other in NAMES] if every else [f"{name}_x"]
        for other in others:
            if other not in tensors:
                yield f"rename {name} to {other}", rest | {other: tensors[name]}
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.norm", "lm_head"):
        for other in NAMES if every else ("weight_scale", "weight_zero_point", "bias", "input_scale"):
            if f"{module}.{other}" not in tensors:
                for shape in (
                    ((1,), tensors[f"{module}.weight"].shape[:1]) if f"{module}.weight" in tensors else ((1,),)
                ):
                    yield f"add {module}.{other} {list(shape)}", tensors | {f"{module}.{other}": torch.full(shape, 0.5)}


def check(name: str, source: Path, folder: Path, every: bool, sample: int | None = None) -> tuple[int, int]:
    """(cases, refused ones). Fails for a case with other scores, or with an error that is not one line.

    sample: how many cases, chosen by the name; None: all.
    """
    checkpoint = MAKERS[name][0](source, folder / name)
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    right = scores(checkpoint)
    wrong, cases, refused = [], 0, 0
    chosen = list(damages(tensors, every))
    if sample is not None:
        chosen = Random(name).sample(chosen, sample)
    for what, damaged in chosen:
        file.unlink()
        save_file(damaged, file, metadata={"format": "pt"})
        cases += 1
        try:
            found = scores(checkpoint)
        except UserError as error:
            refused += 1
            if "\n" in str(error):
                wrong.append(f"{what}: an error of several lines: {error}")
        except Exception as error:
            wrong.append(f"{what}: {type(error).__name__}: {error}")
        else:
            if not np.allclose(found, right, rtol=1e-4, atol=1e-5):
                wrong.append(f"{what}: other scores")
    assert not wrong, f"{len(wrong)} of {cases} cases:\n" + "\n".join(wrong)
    return cases, refused


@pytest.mark.parametrize("name", MAKERS)
def test_damaged_checkpoint_is_right_or_refused_in_one_line(name: str, source: Path, tmp_path: Path) -> None:
    if missing := missing_packages(name):
        pytest.skip(f"{', '.join(missing)}: not installed")
    cases, refused = check(name, source, tmp_path, every=False)
    assert refused > cases / 3


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_tensors_under_any_other_name_are_right_or_refused(name: str, source: Path, tmp_path: Path) -> None:
    if missing := missing_packages(name):
        pytest.skip(f"{', '.join(missing)}: not installed")
    check(name, source, tmp_path, every=True, sample=6)  # of some 280, which sample=None runs in minutes
