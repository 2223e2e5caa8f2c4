"""Whole checkpoints of the decoded formats in `hf_quant`: weights, figures, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lmeval_ext.decoding.checkpoint import decoded, decoding_method
from lmeval_ext.errors import UserError
from tests.conftest import make_llama
from tests.decoding.packers import PACKERS, quantized_checkpoint

METHODS = {
    "fp8": "fp8", "fp8-modelopt": "modelopt", "nvfp4": "modelopt", "aqlm": "aqlm", "vptq": "vptq", "anyprec": "anyprec",
    "hqq": "hqq", "qtip": "qtip",
}  # fmt: skip
pytestmark = pytest.mark.slow  # test_formats.py is the short form
BASE = "model.layers.0.mlp.down_proj"
WEIGHT_ONLY = {"fp8", "fp8-modelopt", "nvfp4"}


@pytest.fixture(scope="module")
def dense_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("dense"), "float16")


@pytest.fixture
def llama(dense_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense_llama, tmp_path / "model"))


@pytest.fixture(scope="module")
def packed(dense_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Makes a checkpoint of a format once: (its folder, the weights of its matrices)."""
    made: dict[str, tuple[Path, Any]] = {}

    def make(kind: str) -> tuple[Path, Any]:
        if kind not in made:
            folder = Path(shutil.copytree(dense_llama, tmp_path_factory.mktemp(kind) / "model"))
            made[kind] = folder, quantized_checkpoint(folder, kind)
        return made[kind]

    return make


def load(folder: Path, **arguments: Any) -> Any:
    from lm_eval.api.registry import get_model

    return get_model("hf_quant")(pretrained=str(folder), device="cpu", **arguments)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def assert_weights(state: dict[str, torch.Tensor], dense: dict[str, np.ndarray]) -> None:
    for name, expected in dense.items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(state[name].double().numpy(), expected, rtol=3e-6, atol=1e-6 * scale, err_msg=name)


@pytest.mark.parametrize("kind", PACKERS)
def test_decoded_checkpoint_has_the_weights_of_a_second_decode(kind: str, packed: Any) -> None:
    folder, dense = packed(kind)
    assert decoding_method(folder) == METHODS[kind]
    assert_weights(decoded(folder, torch.float32, quiet=True), dense)


@pytest.mark.engine
@pytest.mark.parametrize("kind", PACKERS)
def test_hf_quant_runs_the_decoded_weights(kind: str, packed: Any) -> None:
    folder, dense = packed(kind)
    model = load(folder)
    state = model.model.state_dict()
    assert_weights(state, dense)
    stored = load_file(folder / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(state[name], stored[name].float())
    info = model.get_model_info()["quantization"]
    assert (info["kernel"], info["dtype"]) == ("decoded", "float32")
    assert info["head_bpw"] == 16
    assert info["layer_bpw"] is not None
    assert info["scheme"] is not None
    assert any("weight-only" in note for note in info["notes"]) == (kind in WEIGHT_ONLY)


@pytest.mark.engine
def test_old_modelopt_export_is_decoded(llama: Path) -> None:
    """With hf_quant_config.json alone: Transformers would load the codes without their scales."""
    dense = quantized_checkpoint(llama, "fp8-modelopt")
    edit_config(llama, lambda config: config.pop("quantization_config"))
    exported = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    (llama / "hf_quant_config.json").write_text(json.dumps(exported))
    model = load(llama)
    assert_weights(model.model.state_dict(), dense)
    notes = model.get_model_info()["quantization"]["notes"]
    assert any("KV cache" in note for note in notes)


@pytest.mark.parametrize(("kind", "settings"), [("fp8", {"scale": "row"}), ("nvfp4_packed", {})])
def test_scaled_floats_without_a_config_are_decoded(llama: Path, kind: str, settings: dict[str, Any]) -> None:
    """As compressed-tensors stores them, in a checkpoint whose config.json lost its quantization_config."""
    dense = quantized_checkpoint(llama, kind, **settings)
    edit_config(llama, lambda config: config.pop("quantization_config"))
    rewrite(llama, lambda t: [t.pop(name) for name in list(t) if name.endswith("input_scale")])
    assert decoding_method(llama) == "none"
    assert_weights(decoded(llama, torch.float32, quiet=True), dense)


def test_formats_of_transformers_are_left_to_it(llama: Path) -> None:
    assert decoding_method(llama) is None  # dense
    quantized_checkpoint(llama, "fp8", scale="block")
    rewrite(llama, lambda t: t.update({n + "_inv": t.pop(n) for n in list(t) if n.endswith("weight_scale")}))
    assert decoding_method(llama) is None  # DeepSeek's and Transformers' own FP8


@pytest.mark.engine
@pytest.mark.parametrize("old", [False, True])
def test_hub_checkpoint_is_complete_before_the_format_is_judged(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    """Of a hub checkpoint, config.json alone is there at first; the tensors, or another file, name the layout."""
    from lmeval_ext.models.hf import decoded as module

    dense = quantized_checkpoint(llama, "fp8-modelopt" if old else "fp8")
    if old:
        edit_config(llama, lambda config: config.pop("quantization_config"))
        (llama / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    shutil.copy(llama / "config.json", snapshot)

    def fetch(name: str, file: str, **_: Any) -> str:
        return str(shutil.copy(llama / file, snapshot))

    def fetch_all(name: str, **_: Any) -> str:
        return str(shutil.copytree(llama, snapshot, dirs_exist_ok=True))

    monkeypatch.setattr(module, "hf_hub_download", fetch)
    monkeypatch.setattr(module, "snapshot_download", fetch_all)
    folder = Path(module.with_deciding_files("someone/model", None, str(snapshot), ""))
    assert decoding_method(folder) == ("modelopt" if old else "fp8")
    fetch_all("someone/model")
    assert_weights(decoded(folder, torch.float32, quiet=True), dense)


# Any-Precision: each precision of one file is a model of its own


@pytest.mark.engine
def test_precisions_of_one_file_are_models_of_their_own(llama: Path) -> None:
    quantized_checkpoint(llama, "anyprec")
    expected = {bits: PACKERS["anyprec"](0, 64, 128, precision=bits).weights for bits in (3, 4, 6)}
    for bits, weights in expected.items():
        model = load(llama, precision=bits)
        assert_weights(model.model.state_dict(), {f"{BASE}.weight": weights})
        info = model.get_model_info()["quantization"]
        sizes = [(64, 128), (128, 64), (128, 64), (32, 64), (64, 64), (64, 64), (32, 64)]
        counted = sum(out * (size * bits + 16 * 2**bits) for out, size in sizes)
        assert info["layer_bpw"] == counted / sum(out * size for out, size in sizes)
        assert (info["scheme"], info["label"]) == (f"anyprec-{bits}bit", f"model-{bits}bit")
    assert load(llama, precision=4).reference_arguments.others["precision"] == "4"
    assert load(llama).label == "model-6bit"


@pytest.mark.parametrize("precision", [2, 7, "4bit", True])
def test_precision_that_the_file_lacks_is_refused(llama: Path, precision: Any) -> None:
    quantized_checkpoint(llama, "anyprec")
    with pytest.raises(UserError, match=rf"precision={precision}: .* holds 3 to 6; give one of them"):
        load(llama, precision=precision)


def test_precision_of_another_format_is_refused(llama: Path) -> None:
    with pytest.raises(UserError, match=r"precision=4: .* holds one precision, not several; drop precision="):
        load(llama, precision=4)


# Pickles


def pickle(folder: Path, content: Any = None) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors if content is None else content, folder / "pytorch_model.bin")


@pytest.mark.engine
def test_pickles_are_read_if_allowed(llama: Path) -> None:
    dense = quantized_checkpoint(llama, "anyprec")
    expected = load(llama).get_model_info()["quantization"]
    pickle(llama)
    model = load(llama, allow_pickle=True)
    assert_weights(model.model.state_dict(), dense)
    info = model.get_model_info()["quantization"]
    for key in ("layer_bpw", "head_bpw", "vram_gb", "family", "scheme", "weight_bytes"):
        assert info[key] == expected[key], key


def test_pickles_are_refused_with_the_way_to_convert_them(llama: Path) -> None:
    quantized_checkpoint(llama, "anyprec")
    pickle(llama)
    with pytest.raises(UserError, match=r"pytorch_model.bin, a pickle.*allow_pickle=True.*python -c") as error:
        load(llama)
    assert "\n" not in str(error.value)


class _Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("code of a pickle ran",)


def test_pickles_with_code_are_refused(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantized_checkpoint(llama, "anyprec")
    pickle(llama, {"model.norm.weight": _Code()})
    with pytest.raises(UserError, match="cannot be read as tensors alone"):
        load(llama, allow_pickle=True)
    assert "ran" not in capsys.readouterr().out


# Damage: one tensor dropped, renamed, added, or of another shape


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def damaged(tensors: dict[str, torch.Tensor], name: str, damage: str) -> dict[str, torch.Tensor]:
    changed = dict(tensors)
    tensor = changed.pop(name)
    if damage == "renamed":
        changed[name + "x"] = tensor
    elif damage == "moved":
        changed["x" + name] = tensor
    elif damage == "added":
        changed |= {name: tensor, name + "_2": tensor.clone()}
    elif damage == "cut" and tensor.dim():
        changed[name] = tensor[:-1].contiguous()
    return changed


@pytest.mark.parametrize("damage", ["dropped", "renamed", "moved", "added", "cut"])
@pytest.mark.parametrize("kind", PACKERS)
def test_damaged_tensors_give_the_right_weights_or_one_line(
    kind: str, damage: str, packed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every tensor of one matrix: its loss may be harmless (scales of activations), never another number."""
    folder, dense = packed(kind)
    tensors = load_file(folder / "model.safetensors")
    shapes = {name: weights.shape for name, weights in dense.items()}
    refused = 0
    for name in [name for name in tensors if name.startswith(BASE + ".")]:
        content = damaged(tensors, name, damage)
        monkeypatch.setattr("lmeval_ext.decoding.checkpoint.StoredTensors", lambda *_, c=content: _InMemory(c))
        state, problem = outcome(folder, shapes)
        if problem is not None:
            assert "\n" not in problem
            refused += 1
            continue
        assert_weights({name: state[name] for name in dense if name in state}, dense)
    assert refused > 0


def outcome(folder: Path, shapes: dict[str, Any]) -> tuple[dict[str, torch.Tensor], str | None]:
    """The decoded tensors, or the message of the error."""
    try:
        return decoded(folder, torch.float32, shapes=shapes, quiet=True), None
    except UserError as error:
        return {}, str(error)


class _InMemory:
    """Stands for `StoredTensors`, with tensors in memory."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        from lmeval_ext.decoding.stored import header_of

        self._tensors, self.names = tensors, set(tensors)
        self._forms = {tensor.name: tensor for tensor in header_of(Path("/nowhere"), tensors)}

    def dtype(self, name: str) -> str:
        return self._forms[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._forms[name].shape

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]


@pytest.mark.engine
@pytest.mark.parametrize("damage", ["dropped", "renamed", "moved", "added"])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_damaged_dense_tensors_are_refused(llama: Path, name: str, damage: str) -> None:
    quantized_checkpoint(llama, "fp8")
    stored = load_file(llama / "model.safetensors")
    save_file(damaged(stored, name, damage), llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has no|has no place|no fp8 matrix uses") as error:
        load(llama)
    assert "\n" not in str(error.value)
