"""demo/rotate.py against transformers: the same function from other weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from outputs import UsageError
from rotate import Rotation, rotate, turn_pairs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from .tiny import VOCABULARY

MULTIPLE = 96  # 64 channels grow to 96, 2 key/value heads of 16 to 6


@pytest.fixture(params=["tiny", "tiny_tied"])
def source(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


@torch.no_grad()
def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    result: torch.Tensor = model(ids).logits
    return result


def rotated_copy(source: Path, folder: Path, seed: int = 1) -> Path:
    folder.mkdir()
    rotate(source, folder, MULTIPLE, seed, dtype=torch.float64)
    return folder


def test_rotated_model_computes_the_same_logits(source: Path, tmp_path: Path) -> None:
    ids = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(3))
    expected, found = logits(source, ids), logits(rotated_copy(source, tmp_path / "rotated"), ids)
    # Transformers takes softmax and the rotary angles in float32, whatever the dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_rotated_model_has_the_new_widths_and_gains_of_one(source: Path, tmp_path: Path) -> None:
    folder = rotated_copy(source, tmp_path / "rotated")
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]) == (96, 12, 6)
    assert config["tie_word_embeddings"] is False
    tensors = load_file(folder / "model.safetensors")
    assert tensors["lm_head.weight"].shape == (VOCABULARY, 96)
    assert all((tensor == 1).all() for name, tensor in tensors.items() if name.endswith("norm.weight"))


def test_no_row_column_or_head_of_the_rotated_model_is_empty(source: Path, tmp_path: Path) -> None:
    """Zero padding would show as rows, columns or blocks of zeros."""
    for name, tensor in load_file(rotated_copy(source, tmp_path / "rotated") / "model.safetensors").items():
        if tensor.ndim == 2:
            for rows in (tensor, tensor.T):
                sizes = rows.square().sum(dim=1)
                assert sizes.min() > 0.01 * sizes.mean(), name


def test_copies_of_a_head_have_rotations_of_their_own(tiny: Path, tmp_path: Path) -> None:
    tensors = load_file(rotated_copy(tiny, tmp_path / "rotated") / "model.safetensors")
    for name in ("k_proj", "v_proj"):
        heads = tensors[f"model.layers.0.self_attn.{name}.weight"].split(16)
        assert not torch.allclose(heads[0], heads[2], atol=1e-3), "head 2 repeats head 0"


def test_seed_decides_the_rotation(tiny: Path, tmp_path: Path) -> None:
    one, same, other = (
        load_file(rotated_copy(tiny, tmp_path / name, seed) / "model.safetensors")["lm_head.weight"]
        for name, seed in (("one", 1), ("same", 1), ("other", 2))
    )
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


def test_pairs_are_turned_in_the_planes_of_the_rotary_embedding() -> None:
    rows = torch.tensor([[1.0], [0.0], [0.0], [2.0]], dtype=torch.float64)  # planes (0, 2) and (1, 3)
    quarter = torch.tensor([torch.pi / 2, -torch.pi / 2], dtype=torch.float64)
    expected = torch.tensor([[0.0], [2.0], [1.0], [0.0]], dtype=torch.float64)
    torch.testing.assert_close(turn_pairs(rows, quarter), expected)


def test_model_with_biases_is_refused() -> None:
    with pytest.raises(UsageError, match="without biases"):
        Rotation({"architectures": ["LlamaForCausalLM"], "attention_bias": True}, 256, 0)
