"""Decoders of EXL3 and EXL2, compared bit by bit with the formats taken literally, and with the engines."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lmeval_ext.decoding import exl2, exl3
from lmeval_ext.decoding.checkpoint import decoded, decoding_method
from lmeval_ext.errors import UserError
from lmeval_ext.requests import window_request
from tests.conftest import make_llama, make_tokenizer

FIXTURES = Path(__file__).parents[1] / "models" / "fixtures"
REFERENCES = sorted(FIXTURES.glob("tiny-exl*/reference.json"))
needs_fixtures = pytest.mark.skipif(not REFERENCES, reason="no tests/models/fixtures/tiny-exl*/ from a GPU host")
each_fixture = pytest.mark.parametrize("folder", [r.parent for r in REFERENCES], ids=lambda folder: folder.name)

WIDTHS = [1, 2, 3, 4, 5, 6, 7, 8, 1.5, 2.5, 3.5]


def trellis_of(rows: int, columns: int, bits: float, seed: int = 0) -> torch.Tensor:
    """A trellis of random bits, int16 [rows / 16, columns / 16, 16 * bits]; any bits are valid."""
    rng = np.random.default_rng(seed)
    words = rng.integers(-(1 << 15), 1 << 15, size=(rows // 16, columns // 16, round(16 * bits)))
    return torch.from_numpy(words.astype(np.int16))


# EXL3


def literal_states(words: np.ndarray, bits: float) -> dict[int, int]:
    """State of each position of one tile, read from a string of bits. words: int16 [16 * bits]."""
    pairs = words.view(np.uint16).reshape(-1, 2)
    ring = "".join(f"{int(high):016b}{int(low):016b}" for low, high in pairs)  # int32 words, highest bit first
    assert len(ring) == 256 * bits
    states, end = {}, 0
    for position in range(256):
        end += int(bits) + (position % 2 if bits % 1 else 0)  # half rates: odd positions have the extra bit
        states[position] = int("".join(ring[(end - 16 + i) % len(ring)] for i in range(16)), 2)
    return states


def literal_place(position: int) -> tuple[int, int]:
    """Row and column of a position: two 8-wide halves of an mma.m16n8k16 B operand, PTX ISA "Matrix Fragments".

    Lane t of 32 holds b0…b3 of each half in rows 2 (t mod 4) + (0, 1, 8, 9) and column t / 4; a lane's eight
    positions are those of the left half, then those of the right.
    """
    lane, register = divmod(position, 8)
    half, b = divmod(register, 4)
    return 2 * (lane % 4) + (0, 1, 8, 9)[b], lane // 4 + 8 * half


@pytest.mark.parametrize("bits", WIDTHS)
def test_exl3_states_are_the_bits_of_the_ring(bits: float) -> None:
    trellis = trellis_of(32, 48, bits)
    states = exl3.states(trellis)
    for row, column in ((0, 0), (1, 2)):
        for position, state in literal_states(trellis[row, column].numpy(), bits).items():
            r, c = literal_place(position)
            assert states[row, column, 16 * r + c] == state, (position, row, column)


@pytest.mark.parametrize("bits", [3, 2.5])
def test_exl3_inner_puts_tiles_in_their_places(bits: float) -> None:
    trellis = trellis_of(32, 48, bits, seed=1)
    table = exl3.codebook("mul1")
    inner = exl3.inner(trellis, "mul1")
    assert inner.shape == (32, 48)
    for position, state in literal_states(trellis[1, 2].numpy(), bits).items():
        r, c = literal_place(position)
        assert inner[16 + r, 32 + c] == table[state]


def fraction_of(pattern: int) -> float:
    """The float16 with these bits, by IEEE 754."""
    sign, exponent, mantissa = pattern >> 15, pattern >> 10 & 31, pattern & 1023
    value = mantissa * 2.0**-24 if exponent == 0 else (1024 + mantissa) * 2.0 ** (exponent - 25)
    return -value if sign else value


@pytest.mark.parametrize("name", ["3inst", "mcg", "mul1"])
def test_exl3_codebook_equals_exact_arithmetic(name: str) -> None:
    """All 65,536 values in Python's integers and exact doubles; numpy rounds the double to float16 once."""
    multiplier, addend = {"3inst": (89226354, 64248484), "mcg": (0xCBAC1FED, 0), "mul1": (0x83DCD12D, 0)}[name]
    exact = []
    for state in range(1 << 16):
        x = (state * multiplier + addend) % (1 << 32)
        if name == "mul1":
            s = 1024 + sum(x.to_bytes(4, "little"))
            exact.append(s * fraction_of(0x1EEE) + fraction_of(0xC931))
        else:
            x = (x & 0x8FFF8FFF) ^ 0x3B603B60
            exact.append(fraction_of(x & 0xFFFF) + fraction_of(x >> 16))
    expected = np.array(exact, dtype=np.float64).astype(np.float16)
    values = exl3.codebook(name).numpy()
    assert (values.view(np.uint16) == expected.view(np.uint16)).all()
    # The codes stand for Gaussian weights (QTIP, arXiv:2406.11235, section 3.1); mul1 divides by its bytes' deviation
    assert values.astype(np.float64).mean() == pytest.approx(0, abs=0.02)
    assert values.astype(np.float64).std() == pytest.approx(1 if name == "mul1" else 1.2437, abs=0.01)


def test_exl3_codebook_values_by_hand() -> None:
    """3INST of state 0: 64248484 = 03D45AA4; & 8FFF8FFF = 03D40AA4, ^ 3B603B60 = 38B431C4: 0.58789 + 0.18018."""
    assert exl3.codebook("3inst")[0].item() == pytest.approx(0.587890625 + 0.18017578125, abs=2**-12)
    # mcg of state 0: 3B60 twice, 0.921875; mul1 of state 0: no bytes, 1024 * 0.0067673 - 10.3828
    assert exl3.codebook("mcg")[0].item() == 2 * 0.921875
    assert exl3.codebook("mul1")[0].item() == pytest.approx(1024 * 0.006767272949 - 10.3828125, abs=2**-9)


def test_exl3_hadamard_is_sylvesters_matrix() -> None:
    from scipy.linalg import hadamard

    assert (exl3.hadamard().numpy() == hadamard(128)).all()


@pytest.mark.parametrize("elements", [1, 1 << 22])
def test_exl3_dense_weight_equals_float64(elements: int) -> None:
    """diag(suh) H inner H diag(svh) in float64; decoded at once or in pieces."""
    from scipy.linalg import hadamard

    rng = np.random.default_rng(2)
    trellis = trellis_of(256, 384, 4, seed=2)
    suh, svh = (torch.from_numpy(rng.normal(size=n)).half() for n in (256, 384))
    rotate = np.kron(np.eye(3), hadamard(128) / math.sqrt(128))
    inner = exl3.inner(trellis, "mcg").double().numpy()
    expected = suh.double().numpy()[:, None] * (rotate[:256, :256] @ inner @ rotate) * svh.double().numpy()
    weight = exl3.decode(trellis, suh, svh, "mcg", torch.float32, elements)
    assert weight.shape == (384, 256)
    np.testing.assert_allclose(weight.numpy(), expected.T, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    halves = exl3.decode(trellis, suh, svh, "mcg", torch.float16, elements)
    assert (halves == weight.half()).all()


def test_exl3_packed_signs_are_unpacked() -> None:
    """In su of older files, bit i of word w is the sign of element 16 w + i."""
    assert exl3.signs(torch.tensor([5, -32768], dtype=torch.int16)).tolist() == [-1, 1, -1] + 13 * [1] + 15 * [1] + [-1]


def test_exl3_refuses_invalid_tensors() -> None:
    ones = torch.ones(128, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"tile of 72 words is 4\.5 bits"):
        exl3.inner(trellis_of(128, 128, 4.5), "mul1")
    with pytest.raises(ValueError, match=r"1\.5 bits per weight go with the mul1 codebook only, this is mcg"):
        exl3.inner(trellis_of(128, 128, 1.5), "mcg")
    with pytest.raises(ValueError, match="64 x 128 weights: both must be multiples of 128"):
        exl3.decode(trellis_of(64, 128, 4), ones[:64], ones, "mcg")
    with pytest.raises(ValueError, match=r"suh \[128\] and svh \[128\] do not fit 128 x 256"):
        exl3.decode(trellis_of(128, 256, 4), ones, ones, "mcg")


# EXL2


def pack_column(codes: list[int], bits: int) -> list[int]:
    """One column's codes as int32 words: a number whose lowest bits are the first code."""
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    words = math.ceil(len(codes) * bits / 32)
    return [int(np.uint32(number >> (32 * i) & 0xFFFFFFFF).astype(np.int32)) for i in range(words)]


def exl2_matrix(
    layout: list[tuple[int, int]], columns: int, seed: int = 0
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Random EXL2 tensors by suffix, and their weights [in, out], computed singly. layout: (bits, rows) per group."""
    rng = np.random.default_rng(seed)
    rows = sum(size for _, size in layout)
    words, starts, weights = [], [], []
    scale_codes = rng.integers(0, 16, (len(layout), columns))
    largest = rng.uniform(0.5, 8, len(layout)).astype(np.float16)
    largest[-1] = 1e-3  # a 256th of it is subnormal: rounded
    for group, (bits, size) in enumerate(layout):
        codes = rng.integers(0, 1 << bits, (size, columns))
        starts.append(sum(len(block) for block in words))
        words.append(np.array([pack_column(codes[:, c].tolist(), bits) for c in range(columns)], dtype=np.int32).T)
        for r in range(size):
            top = np.float16(np.float32(largest[group]) / np.float32(256))
            scale = [np.float16(np.float16((int(code) + 1) ** 2) * top) for code in scale_codes[group]]
            integers = [np.float16(int(code) - (1 << (bits - 1))) for code in codes[r]]
            weights.append([a * b for a, b in zip(integers, scale, strict=True)])
    order = rng.permutation(rows)  # sorted row i is input order[i]
    dense = np.empty((rows, columns), np.float16)
    dense[order] = np.array(weights, dtype=np.float16)
    tensors = {
        "q_weight": torch.from_numpy(np.concatenate(words)).contiguous(),
        "q_scale": torch.from_numpy(np.array([pack_column(row.tolist(), 4) for row in scale_codes], dtype=np.int32)),
        "q_scale_max": torch.from_numpy(largest),
        "q_groups": torch.tensor(
            [x for (bits, _), start in zip(layout, starts, strict=True) for x in (bits, start)]
        ).short(),
        "q_invperm": torch.from_numpy(np.argsort(order).astype(np.int32)),
    }
    return tensors, dense


LAYOUTS = {
    "one width": [(4, 128)],
    "all widths": [(8, 32), (6, 32), (5, 32), (4, 32), (3, 32), (2, 32)],
    "short last group": [(5, 64), (3, 128), (3, 96)],
    "last word not full": [(5, 64), (5, 40)],
    "groups of 16": [(3, 32), (2, 16), (2, 16)],
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("elements", [1, 1 << 22])
def test_exl2_weights_equal_the_format(name: str, elements: int) -> None:
    tensors, expected = exl2_matrix(LAYOUTS[name], columns=32)
    weight = exl2.decode(**tensors, elements=elements).numpy()
    assert (weight.T.copy().view(np.uint16) == expected.view(np.uint16)).all()


def test_exl2_refuses_tensors_that_do_not_fit() -> None:
    tensors, _ = exl2_matrix([(4, 64), (3, 64)], columns=32)
    with pytest.raises(ValueError, match="a group of 7 bits"):
        exl2.decode(**{**tensors, "q_groups": torch.tensor([7, 0, 3, 8]).short()})
    with pytest.raises(ValueError, match="groups hold 128 of 160 rows"):
        exl2.decode(**{**tensors, "q_invperm": torch.arange(160)})
    with pytest.raises(ValueError, match="not a permutation"):
        exl2.decode(**{**tensors, "q_invperm": torch.zeros(128, dtype=torch.int32)})
    with pytest.raises(ValueError, match=r"q_scale \[1, 4\]"):
        exl2.decode(**{**tensors, "q_scale": tensors["q_scale"][:1]})


# Generated checkpoints, in which every weight is known


def random_exl3(out: int, size: int, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random EXL3 tensors by suffix, codebook and width by the seed; and their float32 weights [out, in]."""
    rng, book = np.random.default_rng(seed), ("3inst", "mcg", "mul1")[seed % 3]
    out = math.ceil(out / 128) * 128
    trellis = trellis_of(size, out, (1 + seed) % 8 + 1, seed)
    suh, svh = (torch.from_numpy(rng.choice([-0.1, 0.1], n)).half() for n in (size, out))
    tensors = {"trellis": trellis, "suh": suh, "svh": svh}
    if book != "3inst":
        tensors[book] = torch.tensor(exl3.MULTIPLIERS[book] - (1 << 32), dtype=torch.int32)
    return tensors, exl3.decode(trellis, suh, svh, book, torch.float32)


def random_exl2(out: int, size: int, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random EXL2 tensors by suffix, and their float32 weights [out, in]."""
    tensors, _ = exl2_matrix([(6, size // 2), (4, size // 4), (3, size // 4)], math.ceil(out / 32) * 32, seed)
    tensors["q_scale_max"] /= 64
    return tensors, exl2.decode(**tensors, dtype=torch.float32)


def quantize_stored(
    folder: Path, method: str, chosen: Callable[[str], bool], head: tuple[int, int] | None = None
) -> dict[str, torch.Tensor]:
    """Replace a checkpoint's chosen matrices by random quantized ones; return all its float32 weights.

    head: shape of an output matrix to add.
    """
    stored, dense = load_file(folder / "model.safetensors"), {}
    shapes: dict[str, Any] = {name: stored.pop(name).shape for name in list(stored) if chosen(name)}
    if head:
        shapes["lm_head.weight"] = head
    for seed, (name, (out, size)) in enumerate(shapes.items()):
        tensors, dense[name] = (random_exl3 if method == "exl3" else random_exl2)(out, size, seed)
        stored |= {name.removesuffix("weight") + suffix: tensor for suffix, tensor in tensors.items()}
    dense |= {name: tensor.float() for name, tensor in stored.items() if name.endswith((".weight", ".bias"))}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4.0}
    (folder / "config.json").write_text(json.dumps(config))
    return dense


def quantized_llama(folder: Path, method: str, vocabulary: int = 384, head: bool = True) -> dict[str, torch.Tensor]:
    """A Llama of random quantized matrices whose config ties the output matrix; returns its dense weights."""
    make_llama(
        folder, "float16", vocabulary, hidden_size=128, intermediate_size=256, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return quantize_stored(
        folder, method, lambda name: name.endswith("_proj.weight"), (vocabulary, 128) if head else None
    )


def load(folder: Path, **arguments: Any) -> Any:
    from lm_eval.api.registry import get_model

    return get_model("hf_quant")(pretrained=str(folder), **arguments)


@pytest.mark.engine
@pytest.mark.parametrize("method", ["exl3", "exl2"])
def test_hf_quant_has_the_decoded_weights(method: str, tmp_path: Path) -> None:
    """Also with a separate output matrix in a model whose config ties it, and with a padded vocabulary."""
    dense = quantized_llama(tmp_path, method, vocabulary=375)
    model = load(tmp_path, device="cpu")
    state = model.model.state_dict()
    assert state.keys() == dense.keys()
    for name, tensor in dense.items():
        assert state[name].dtype == torch.float32
        assert (state[name] == tensor[: len(state[name])]).all(), name
    assert model.model.get_output_embeddings().weight.shape == (375, 128)
    info = model.get_model_info()["quantization"]
    assert (info["kernel"], info["family"], info["dtype"]) == ("decoded", method.upper(), "float32")
    assert info["layer_bpw"] is not None
    assert any("decoded to dense weights" in note for note in info["notes"])
    logits = model._score([window_request("w", list(range(2, 60)), 1, {}, (None, None, None))])
    assert np.isfinite(logits[0].logprobs).all()


@pytest.mark.engine
def test_requested_dtype_and_tied_weights_are_kept(tmp_path: Path) -> None:
    dense = quantized_llama(tmp_path, "exl3", head=False)
    model = load(tmp_path, device="cpu", dtype="bfloat16").model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    name = "model.layers.1.mlp.down_proj.weight"
    assert (model.state_dict()[name] == dense[name].bfloat16()).all()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


KEY = "model.layers.0.self_attn.k_proj"
BREAKAGES: dict[str, tuple[Any, str]] = {
    "missing side": (lambda t: t.pop(f"{KEY}.svh"), r"k_proj' has no tensor '.sv'"),
    "missing matrix": (lambda t: [t.pop(n) for n in list(t) if KEY in n], "has no model.layers.0.self_attn.k_proj"),
    "wrong codebook": (
        lambda t: t.update({f"{KEY}.mcg": torch.tensor(7, dtype=torch.int32)}),
        "k_proj' cannot be decoded: an unknown codebook",
    ),
    "wrong shape": (
        lambda t: t.update({f"{KEY}.trellis": trellis_of(128, 256, 4), f"{KEY}.svh": torch.ones(256).half()}),
        r"k_proj' is \[256, 128\], but the model of config.json has \[128, 128\]",
    ),
    "quantized embeddings": (
        lambda t: t.update(
            {"model.embed_tokens.trellis": trellis_of(16, 16, 4), "model.embed_tokens.signs": torch.ones(2)}
        ),
        "quantized embedding table",
    ),
}


@pytest.mark.engine
@pytest.mark.parametrize("name", BREAKAGES)
def test_checkpoints_that_cannot_be_decoded_are_refused(name: str, tmp_path: Path) -> None:
    quantized_llama(tmp_path, "exl3")
    change, message = BREAKAGES[name]
    rewrite(tmp_path, change)
    with pytest.raises(UserError, match=message):
        load(tmp_path, device="cpu")


@pytest.mark.engine
def test_tensors_without_a_place_in_the_model_are_noted(tmp_path: Path) -> None:
    quantized_llama(tmp_path, "exl3")
    rewrite(tmp_path, lambda tensors: tensors.update({"mtp.fc.weight": torch.ones(2, 2)}))
    notes = load(tmp_path, device="cpu").get_model_info()["quantization"]["notes"]
    assert "1 tensors have no place in Transformers' model: mtp.fc.weight" in notes


@pytest.mark.engine
def test_experts_are_stacked(tmp_path: Path) -> None:
    """ExLlama stores a mixture's experts separately, as the original checkpoint does; Transformers 5 joins them."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    mixture = MixtralForCausalLM(MixtralConfig(**sizes, vocab_size=384, num_hidden_layers=1, num_local_experts=2))
    mixture.save_pretrained(tmp_path)
    make_tokenizer(tmp_path)
    quantize_stored(tmp_path, "exl3", lambda name: ".experts." in name)
    model = load(tmp_path, device="cpu").model
    dense = decoded(tmp_path, torch.float32, quiet=True)
    base = "model.layers.0.block_sparse_moe.experts.1."
    assert any(name.startswith(base) for name in dense)
    (down,) = [tensor for name, tensor in model.state_dict().items() if name.endswith("experts.down_proj")]
    assert (down[1] == dense[f"{base}w2.weight"]).all()
    assert load_file(tmp_path / "model.safetensors").keys() & dense.keys()


@pytest.mark.engine
def test_matrices_that_transformers_joins_are_joined(tmp_path: Path) -> None:
    """ExLlama stores q, k, v and gate, up of Phi-3 separately; the model has qkv_proj and gate_up_proj."""
    dense = quantized_llama(tmp_path, "exl3")
    layer = "model.layers.0.self_attn."
    shapes = {f"{layer}qkv_proj.weight": (384, 128)}
    state = decoded(tmp_path, torch.float32, shapes=shapes, quiet=True)
    expected = torch.cat([dense[f"{layer}{part}_proj.weight"] for part in "qkv"])
    assert (state[f"{layer}qkv_proj.weight"] == expected).all()
    assert f"{layer}q_proj.weight" not in state


@pytest.mark.engine
def test_decoding_method_is_read_from_the_config(tmp_path: Path) -> None:
    make_llama(tmp_path)
    assert decoding_method(tmp_path) is None
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "EXL3"}}')
    assert decoding_method(tmp_path) == "exl3"
    assert decoding_method(tmp_path / "nothing") is None


# The engines' own checkpoints, with the engines' results on a GPU (fixtures/make_tiny_exl.py)


def reference(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "reference.json").read_text())
    return record


def spread(tensor: torch.Tensor, count: int) -> torch.Tensor:
    flat = tensor.contiguous().flatten()
    return torch.stack([flat[i * flat.numel() // count] for i in range(count)])


@needs_fixtures
@each_fixture
def test_weights_equal_the_engines(folder: Path) -> None:
    """EXL2 and the rotated weights of EXL3 bit for bit; EXL3's dense weights up to the engine's own roundings."""
    stored = load_file(next(folder.glob("*.safetensors")))
    weights = decoded(folder, torch.float16, quiet=True)
    layers = reference(folder)["layers"]
    assert {name for name in stored if name.endswith((".trellis", ".q_weight"))} == {
        f"{name}.{'trellis' if 'inner' in entry else 'q_weight'}" for name, entry in layers.items()
    }
    for name, entry in layers.items():
        weight = weights[f"{name}.weight"].T
        engine = torch.tensor(entry["weight"])
        if "inner" in entry:
            inner = exl3.inner(stored[f"{name}.trellis"], entry["codebook"])
            assert digest(inner) == entry["inner_sha256"], name
            # four roundings to float16 (2^-11 each) of sums of 128
            limit = 2**-9 * weight.float().abs().max().item()
            assert (spread(weight, len(engine)).float() - engine).abs().max() <= limit, name
        else:
            assert digest(weight) == entry["weight_sha256"], name


@needs_fixtures
@each_fixture
def test_bits_per_weight_equal_the_engines(folder: Path) -> None:
    """By ExLlamaV3's get_storage_info; ExLlamaV2 has no such function."""
    from lmeval_ext.storage import inspect

    if (storage_info := reference(folder)["storage_info"]) is not None:
        info = inspect(folder)
        assert [info.layer_bpw, info.head_bpw] == pytest.approx(storage_info[:2], abs=1e-9)
        assert info.layer_bits + info.head_bits == round(storage_info[2])


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.engine
@needs_fixtures
@each_fixture
def test_perplexity_equals_the_engines(folder: Path) -> None:
    """Within 0.1 % of the engine's own forward on the same windows of the bundled text."""
    from tokenizers import Tokenizer

    from lmeval_ext.tasks.corpus import SAMPLE

    record = reference(folder)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(SAMPLE.read_text(encoding="utf-8")).ids
    length = record["window"]
    rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest() == record["ids_sha256"]
    model = load(folder, device="cpu", batch_size=16)
    windows = [window_request(str(i), row, 1, {}, (None, None, None)) for i, row in enumerate(rows)]
    scores = model._loglikelihood_tokens(windows)
    nll = -np.concatenate([np.asarray(s.logprobs, dtype=np.float64) for s in scores])
    assert math.exp(nll.mean()) == pytest.approx(record["perplexity"], rel=1e-3)
