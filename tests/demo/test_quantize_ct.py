"""demo/quantize_ct.py against round-to-nearest computed here from the formats' definitions."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import outputs
import pytest
import quantize_ct
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from .tiny import TEXT

Q = "model.layers.0.self_attn.q_proj"
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # OCP MX specification 1.0, table 5 (E2M1)

Quantize = Callable[..., Path]


@pytest.fixture
def quantize(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Quantize:
    def call(scheme: str, *options: str, source: Path = tiny) -> Path:
        target = tmp_path / scheme
        arguments = ["quantize_ct.py", str(source), str(target), "--scheme", scheme, *options]
        monkeypatch.setattr(sys, "argv", arguments)
        quantize_ct.main()
        return target

    return call


def nearest_fp4(values: np.ndarray) -> np.ndarray:
    """Returns the nearest FP4 value, ties to the even mantissa (even index of the table)."""
    distance = np.abs(np.abs(values)[:, None] - FP4)
    even_first = np.argsort(np.arange(8) % 2, kind="stable")
    index = even_first[distance[:, even_first].argmin(1)]
    return np.sign(values) * FP4[index]


def unpack(packed: torch.Tensor) -> np.ndarray:
    """Returns the FP4 values of packed bytes: low nibble first, bit 3 is the sign."""
    nibbles = np.stack([packed.numpy() & 15, packed.numpy() >> 4], -1).reshape(packed.shape[0], -1)
    return np.where(nibbles & 8, -1, 1) * FP4[nibbles & 7]


def test_nvfp4_block_equals_the_definition(tiny: Path, quantize: Quantize) -> None:
    source, found = load_file(tiny / "model.safetensors"), load_file(quantize("NVFP4A16") / "model.safetensors")
    group = [source[Q.replace("q_proj", f"{name}_proj") + ".weight"] for name in "qkv"]
    # llm-compressor divides in the weights' own bfloat16, here and for the block's scale.
    global_scale = (448 * 6 / max(weight.abs().max() for weight in group)).float().item()
    assert found[f"{Q}.weight_global_scale"].tolist() == [global_scale]

    block = source[f"{Q}.weight"][5, 32:48]
    scale = ((block.abs().max() / 6).float() * global_scale).to(torch.float8_e4m3fn).float().item()
    assert found[f"{Q}.weight_scale"].float()[5, 2].item() == scale
    expected = nearest_fp4(block.float().numpy().astype(np.float64) / (scale / global_scale))
    np.testing.assert_array_equal(unpack(found[f"{Q}.weight_packed"])[5, 32:48], expected)


def test_global_scales_are_shared_as_vllm_fuses(quantize: Quantize) -> None:
    found = load_file(quantize("NVFP4A16") / "model.safetensors")

    def scale(layer: str) -> float:
        return found[f"model.layers.1.{layer}_proj.weight_global_scale"].item()

    assert scale("self_attn.q") == scale("self_attn.k") == scale("self_attn.v")
    assert scale("mlp.gate") == scale("mlp.up")
    assert len({scale("self_attn.q"), scale("self_attn.o"), scale("mlp.gate"), scale("mlp.down")}) == 4


def test_int8_channel_equals_the_definition(tiny: Path, quantize: Quantize) -> None:
    folder = quantize("W8A16_CHANNEL")
    row = load_file(tiny / "model.safetensors")[f"{Q}.weight"][3]
    found = load_file(folder / "model.safetensors")
    scale = row.abs().max() / 127.5  # calculate_qparams: absmax over half of the range 255; in bfloat16
    assert found[f"{Q}.weight_scale"][3].item() == scale.item()
    words = found[f"{Q}.weight_packed"][3].numpy().view(np.uint8).astype(np.int16) - 128
    expected = np.clip(np.rint((row / scale).float().numpy()), -128, 127)
    np.testing.assert_array_equal(words, expected)


def test_input_global_scale_comes_from_the_calibration_text(tiny: Path, tmp_path: Path, quantize: Quantize) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:4000], encoding="utf-8")
    folder = quantize("NVFP4", "--calibration", str(text), "--calibration-tokens", "1024")
    found = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    ids = AutoTokenizer.from_pretrained(tiny)(TEXT[:4000], verbose=False).input_ids[:1024]
    rows = torch.tensor(ids).view(2, 512)
    with torch.no_grad():
        hidden = [model.model.embed_tokens(row[None]) for row in rows]
    absmax = max(model.model.layers[0].input_layernorm(h).abs().max() for h in hidden)
    assert found[f"{Q}.input_global_scale"].item() == (448 * 6 / absmax).item()
    others = {found[f"model.layers.0.{n}_proj.input_global_scale"].item() for n in ("self_attn.o", "mlp.down")}
    assert found[f"{Q}.input_global_scale"].item() not in others


@pytest.mark.parametrize("scheme", ["NVFP4A16", "NVFP4", "FP8_DYNAMIC", "W8A16_CHANNEL", "W4A16_G32", "W8A8", "FP8"])
def test_transformers_loads_the_checkpoint_and_logits_are_similar(scheme: str, tiny: Path, quantize: Quantize) -> None:
    folder = quantize(scheme, "--calibration-tokens", "512")
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(TEXT[:300]).input_ids])
    full = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    quantized = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        expected, found = full(ids).logits.float(), quantized(ids).logits.float()
    similarity = torch.cosine_similarity(expected.flatten(), found.flatten(), dim=0).item()
    assert 0.6 < similarity < 0.9999  # similar, not equal (W4A4 on random weights is rough)


def test_folder_has_config_tokenizer_and_weights(tiny: Path, quantize: Quantize) -> None:
    folder = quantize("W4A16_G32")
    config = json.loads((folder / "config.json").read_text())
    settings = config["quantization_config"]
    weights = settings["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["strategy"], weights["group_size"]) == (4, "group", 32)
    assert (settings["format"], settings["quant_method"]) == ("pack-quantized", "compressed-tensors")
    assert (settings["ignore"], settings["quantization_status"]) == (["lm_head"], "compressed")
    assert config["rope_theta"] == 500.0  # which transformers itself drops when it saves
    assert (folder / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()
    tensors = load_file(folder / "model.safetensors")
    torch.testing.assert_close(
        tensors["lm_head.weight"], load_file(tiny / "model.safetensors")["lm_head.weight"], rtol=0, atol=0
    )


def test_tied_output_matrix_is_not_written(tiny_tied: Path, quantize: Quantize) -> None:
    folder = quantize("NVFP4A16", source=tiny_tied)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True


def test_same_input_gives_the_same_bytes(tmp_path: Path, quantize: Quantize) -> None:
    first = (quantize("NVFP4", "--calibration-tokens", "512") / "model.safetensors").read_bytes()
    (tmp_path / "NVFP4").rename(tmp_path / "first")
    assert (quantize("NVFP4", "--calibration-tokens", "512") / "model.safetensors").read_bytes() == first


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("NVFP5", (), "NVFP5: no such preset"),
        ("NVFP4_G32", (), "group size is fixed"),
        ("UNQUANTIZED", (), "does not quantize weights"),
        ("FP8_BLOCK", (), "not supported"),
        ("W4A16", (), "group size 128 does not divide"),
        ("NVFP4", ("--calibration-tokens", "100"), "at least 512"),
        ("NVFP4", ("--calibration", "absent.txt"), "absent.txt: no such file"),
        ("NVFP4", ("--calibration-tokens", "10000000"), "fewer than the"),
    ],
)
def test_bad_input_is_refused_and_leaves_no_files(
    scheme: str, options: tuple[str, ...], message: str, tmp_path: Path, quantize: Quantize
) -> None:
    with pytest.raises(outputs.UsageError, match=message):
        quantize(scheme, *options)
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_refused(tmp_path: Path, quantize: Quantize) -> None:
    (tmp_path / "FP8").mkdir()
    with pytest.raises(outputs.UsageError, match="exists already"):
        quantize("FP8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3-moe", "gpt2"])
def test_model_with_matrices_of_other_layers_is_refused(name: str, quantize: Quantize, tmp_path: Path) -> None:
    """Stacked experts and Conv1D would stay as they are in a checkpoint that says NVFP4A16."""
    from tests.architectures.checkpoints import make_checkpoint

    make_checkpoint(name, tmp_path / "source")
    with pytest.raises(outputs.UsageError, match="matrices are not those of a Linear layer and would stay unquantized"):
        quantize("NVFP4A16", source=tmp_path / "source")
    assert not (tmp_path / "NVFP4A16").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "jamba"])
def test_states_and_convolutions_are_no_matrices(name: str) -> None:
    from tests.architectures.checkpoints import ARCHITECTURES, make_model

    model = make_model(ARCHITECTURES[name])
    for path, module in model.named_modules():  # jamba's experts are stacked
        if path.endswith("experts"):
            module._parameters.clear()
        if path.endswith("router"):
            module._parameters.clear()
    quantize_ct.check_layers(model, name)
