"""EXL2 and EXL3: the headers of two real checkpoints, against the figures of exllamav2 0.3.2 and exllamav3 1.6.5."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lmeval_ext.storage import StorageError, inspect
from tests.storage.builders import FIXTURES, LLAMA, real_header, write_checkpoint


def test_exl3_matches_exllamav3(tmp_path: Path) -> None:
    config = json.loads((FIXTURES / "exl3-4.0bpw.json").read_text())["config"]
    info = inspect(real_header("exl3-4.0bpw", tmp_path, config))
    assert info.layer_bpw == pytest.approx(4.037704, abs=5e-7)
    assert info.head_bpw == pytest.approx(6.021160, abs=5e-7)
    assert info.layer_bits + info.head_bits == 846_490_208
    assert info.vram_gb == 846_490_208 / 8 / 1024**3
    assert (info.family, info.scheme, info.tied) == ("EXL3", "exl3-4.0bpw", False)


def test_exl2_of_a_tied_model_has_its_own_head(tmp_path: Path) -> None:
    config = {**LLAMA, "tie_word_embeddings": True, "num_hidden_layers": 30}
    config["quantization_config"] = {"quant_method": "exl2", "version": "0.3.2", "bits": 4.0, "head_bits": 6}
    info = inspect(real_header("exl2-4.0bpw", tmp_path, config))
    assert info.layer_bpw == pytest.approx(3.999590, abs=5e-7)
    assert info.head_bpw == pytest.approx(6.479826, abs=5e-7)
    assert info.layer_bits + info.head_bits == 608_083_680
    assert (info.family, info.scheme, info.tied) == ("EXL2", "exl2-4.0bpw", False)


def test_exl3_matrix_matches_figures_by_hand(tmp_path: Path) -> None:
    """A 256 x 128 matrix at 3 bits: 256*128*3 bits of trellis, 16 bits per sign, one 32-bit codebook multiplier."""
    spec = {
        "model.layers.0.mlp.up_proj.trellis": ("I16", (16, 8, 48)),
        "model.layers.0.mlp.up_proj.suh": ("F16", (256,)),
        "model.layers.0.mlp.up_proj.svh": ("F16", (128,)),
        "model.layers.0.mlp.up_proj.mcg": ("I32", ()),
        "lm_head.weight": ("F16", (10, 256)),
    }
    config = {**LLAMA, "quantization_config": {"quant_method": "exl3", "bits": 2.25}}
    info = inspect(write_checkpoint(tmp_path, spec, config))
    assert info.layer_bits == 256 * 128 * 3 + 16 * (256 + 128) + 32
    assert info.layer_elements == 256 * 128
    assert info.scheme == "exl3-2.25bpw"


def test_older_exl3_with_half_integer_bits_and_packed_signs_is_read(tmp_path: Path) -> None:
    """exllamav3's LinearEXL3: a tile is 16 * K int16, K may be 2.5; su and sv hold 16 signs per int16."""
    spec = {
        "model.layers.0.mlp.up_proj.trellis": ("I16", (16, 8, 40)),
        "model.layers.0.mlp.up_proj.su": ("I16", (16,)),
        "model.layers.0.mlp.up_proj.sv": ("I16", (8,)),
        "lm_head.weight": ("F16", (10, 256)),
    }
    info = inspect(write_checkpoint(tmp_path, spec, LLAMA))
    assert info.layer_bits == 256 * 128 * 5 // 2 + 256 + 128
    assert info.layer_elements == 256 * 128


@pytest.mark.parametrize("side", [".suh", ".svh"])
def test_signs_that_do_not_fit_the_trellis_give_null(tmp_path: Path, side: str) -> None:
    base = "model.layers.0.mlp.up_proj"
    spec = {
        f"{base}.trellis": ("I16", (16, 8, 48)),
        f"{base}.suh": ("F16", (256,)),
        f"{base}.svh": ("F16", (128,)),
        "lm_head.weight": ("F16", (10, 256)),
    }
    spec[base + side] = ("F16", (99,))
    info = inspect(write_checkpoint(tmp_path, spec, {**LLAMA, "quantization_config": {"quant_method": "exl3"}}))
    assert (info.layer_bpw, info.head_bpw, info.file_bpw) == (None, 16.0, None)
    assert any(base in note and "trellis" in note for note in info.notes)


def split(folder: Path, files: list[str]) -> None:
    """Distribute the tensors of output.safetensors over `files`."""
    tensors = load_file(folder / "output.safetensors")
    (folder / "output.safetensors").unlink()
    names = sorted(tensors)
    for i, file in enumerate(files):
        save_file({name: tensors[name] for name in names[i :: len(files)]}, folder / file)


@pytest.mark.parametrize("shards", [1, 2])
def test_exl2_with_the_originals_index_ignores_it(tmp_path: Path, shards: int) -> None:
    """ExLlamaV2's converter copies the index of a sharded original, which names files that do not exist."""
    original = Path(__file__).parents[1] / "models" / "fixtures" / "tiny-exl2-4.0"
    folder = Path(shutil.copytree(original, tmp_path / "model"))
    files = [f"output-0000{i + 1}-of-00002.safetensors" for i in range(shards)]
    if shards == 2:
        split(folder, files)
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    info = inspect(folder)
    assert info.layer_bpw == inspect(original).layer_bpw
    assert any("copied by ExLlamaV2's converter" in note for note in info.notes)
    if shards == 2:  # a missing file of the converter's own is still an error
        (folder / files[1]).unlink()
        with pytest.raises(StorageError, match="1 of 2 shards are missing"):
            inspect(folder)
