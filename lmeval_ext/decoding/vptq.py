"""Decodes VPTQ to dense weights in plain PyTorch: any device, no kernels.

The format (arXiv:2409.17066; vptq 0.0.5, vptq/ops/ and layers/vqlinear.py). The inputs of a matrix are permuted; the
first z are outliers, the others G groups of n. In each input column, v outputs below each other are one vector of a
codebook, plus one of a residual codebook; outliers have vectors of v0 outputs of their own.

- `indices` int32 [G, ⌈out / v⌉, ⌈n (B + R) / 32⌉]: each row a stream, lowest bit first; element c is the B + R bits
  from bit c (B + R): B = log2 k bits of the main index, and above them R = log2 kr bits of the residual index.
  Unpacked files have `indices` and `res_indices` int16 (read as uint16) [G, ⌈out / v⌉, n].
- `centroids.weight` [G, k v], `res_centroids.weight` [G, kr v]; `outlier_indices` int16 (read as uint16)
  [1, ⌈out / v0⌉, z], `outlier_centroids.weight` [1, k0 v0].
- `perm` int16 (read as uint16) or int64 [in]: column j of the stored matrix is input perm[j].
- `weight_scale`, `weight_bias` [in]: W[:, j] · scale[j] + bias[j], j the input itself.

The parameters of each matrix are in config.json (`config_for_layers` by name, or `shared_layer_config` by the last
part of the name).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lmeval_ext.decoding.parts import Matrix, Parts, expect, expect_shape


@dataclass(frozen=True)
class Settings:
    """Parameters of one matrix: sizes as in the module's docstring, 0 where a part is absent."""

    inputs: int
    outputs: int
    groups: int
    group_size: int
    outliers: int
    vector: int
    centroids: int
    residuals: int
    outlier_vector: int
    outlier_centroids: int
    packed: bool
    norm: bool
    perm: bool


def decode(parts: Parts, dtype: torch.dtype, matrix: Matrix) -> torch.Tensor:
    """One matrix, dtype [out, in], computed in float32. Raises ValueError if tensors and config do not fit."""
    settings = settings_of(matrix)
    _expect_parts(parts, settings)
    stored = torch.empty((settings.outputs, settings.inputs), device=parts[".indices"].device)
    main, residual = _indices(parts, settings)
    for group in range(settings.groups):
        vectors = _book(parts, ".centroids.weight", group, settings.centroids, settings.vector)[main[group]]
        if residual is not None:
            book = _book(parts, ".res_centroids.weight", group, settings.residuals, settings.vector)
            vectors = vectors + book[residual[group]]
        start = settings.outliers + group * settings.group_size
        stored[:, start : start + settings.group_size] = _down(vectors)[: settings.outputs]
    if settings.outliers:
        index = _unsigned(parts[".outlier_indices"][0])
        _expect_below(index, settings.outlier_centroids, "outlier_indices")
        book = _book(parts, ".outlier_centroids.weight", 0, settings.outlier_centroids, settings.outlier_vector)
        stored[:, : settings.outliers] = _down(book[index])[: settings.outputs]
    if settings.perm:
        order = _unsigned(parts[".perm"])
        everything = torch.arange(settings.inputs, device=order.device)
        expect(torch.equal(order.sort().values, everything), "perm is not a permutation of the inputs")
        weight = torch.empty_like(stored)
        weight[:, order] = stored
    else:
        weight = stored
    if settings.norm:
        weight = weight * parts[".weight_scale"].float() + parts[".weight_bias"].float()
    return weight.to(dtype)


def settings_of(matrix: Matrix) -> Settings:
    """The parameters of a matrix in its checkpoint's config. Raises ValueError if it has none, or invalid ones."""
    found = layer_config(matrix.quantization, matrix.name)
    expect(found is not None, "config.json has no parameters for it (quantization_config, config_for_layers)")
    values: Mapping[str, Any] = found or {}
    layout = values.get("vector_quant_dim", "out")
    expect(layout == "out", f"vector_quant_dim {layout!r} is not decoded here")
    expect(not values.get("indices_as_float"), "indices_as_float is not decoded here")
    pairs = {key: values.get(key) for key in ("vector_lens", "num_centroids", "num_res_centroids")}
    sizes = {key: values.get(key) for key in ("in_features", "out_features", "group_num", "group_size", "outlier_size")}
    for key, pair in pairs.items():
        fits = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(n) is int for n in pair)
        expect(fits, f"config.json gives it {key} {pair}, expected two integers")
    for key, number in sizes.items():
        expect(type(number) is int, f"config.json gives it {key} {number}, expected an integer")
    size: dict[str, int] = {key: max(0, number) for key, number in sizes.items() if isinstance(number, int)}
    pair_of: dict[str, list[int]] = {key: [max(0, n) for n in pair] for key, pair in pairs.items() if pair}
    settings = Settings(
        size["in_features"], size["out_features"], size["group_num"], size["group_size"], size["outlier_size"],
        pair_of["vector_lens"][1], pair_of["num_centroids"][1], pair_of["num_res_centroids"][1],
        pair_of["vector_lens"][0], pair_of["num_centroids"][0],
        bool(values.get("is_indice_packed", False)), bool(values.get("enable_norm")), bool(values.get("enable_perm")),
    )  # fmt: skip
    expect(settings.vector > 0 and settings.centroids > 0, "config.json gives it no codebook")
    expect(
        settings.inputs == settings.outliers + settings.groups * settings.group_size,
        f"config.json gives it {settings.inputs} inputs, but {settings.outliers} outliers and {settings.groups} groups "
        f"of {settings.group_size}",
    )
    for count in (settings.centroids, settings.residuals, settings.outlier_centroids if settings.outliers else 0):
        expect(count & (count - 1) == 0, f"config.json gives it {count} centroids, expected a power of two")
    expect(pair_of["num_res_centroids"][0] == 0, "residual vectors of outliers are not decoded here")
    return settings


def layer_config(quantization: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The parameters of a matrix by its name; None if the quantization config has none for it."""
    layers, shared = quantization.get("config_for_layers"), quantization.get("shared_layer_config")
    found = None
    if isinstance(layers, Mapping):
        found = layers.get(name)
    if found is None and isinstance(shared, Mapping):
        found = shared.get(name.rpartition(".")[2])
    if found is None:
        found = quantization.get(name)  # checkpoints of before 19 November 2024
    return found if isinstance(found, Mapping) else None


def _expect_parts(parts: Parts, s: Settings) -> None:
    """Raises ValueError unless the tensors are those of the parameters, in their shapes."""
    rows = -(-s.outputs // s.vector)
    bits = _log2(s.centroids) + _log2(s.residuals)
    shapes: dict[str, tuple[int, ...]] = {
        ".indices": (s.groups, rows, -(-s.group_size * bits // 32) if s.packed else s.group_size),
        ".centroids.weight": (s.groups, s.centroids * s.vector),
    }
    if s.residuals:
        shapes[".res_centroids.weight"] = (s.groups, s.residuals * s.vector)
        if not s.packed:
            shapes[".res_indices"] = (s.groups, rows, s.group_size)
    if s.outliers:
        expect(s.outlier_vector > 0 and s.outlier_centroids > 0, "config.json gives its outliers no codebook")
        shapes[".outlier_indices"] = (1, -(-s.outputs // s.outlier_vector), s.outliers)
        shapes[".outlier_centroids.weight"] = (1, s.outlier_centroids * s.outlier_vector)
    if s.perm:
        shapes[".perm"] = (s.inputs,)
    if s.norm:
        shapes |= {".weight_scale": (s.inputs,), ".weight_bias": (s.inputs,)}
    for suffix in sorted(shapes.keys() - parts.keys()):
        raise ValueError(f"it has no tensor {suffix!r}, which config.json gives it")
    for suffix in sorted(parts.keys() - shapes.keys()):
        raise ValueError(f"it has a tensor {suffix!r}, which config.json does not give it")
    for suffix, shape in shapes.items():
        expect_shape(parts, suffix, *shape)
    expected = torch.int32 if s.packed else torch.int16
    expect(parts[".indices"].dtype == expected, f"indices is {parts['.indices'].dtype}, expected {expected}")


def _indices(parts: Parts, s: Settings) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Main and residual index of every vector, [groups, rows, group_size]."""
    main_bits, residual_bits = _log2(s.centroids), _log2(s.residuals)
    if not s.packed:
        main = _unsigned(parts[".indices"])
        residual = _unsigned(parts[".res_indices"]) if s.residuals else None
        _expect_below(main, s.centroids, "indices")
        if residual is not None:
            _expect_below(residual, s.residuals, "res_indices")
        return main, residual
    width = main_bits + residual_bits
    stream = torch.nn.functional.pad(parts[".indices"].long() & 0xFFFFFFFF, (0, 1))
    start = torch.arange(s.group_size, device=stream.device) * width
    word, shift = start // 32, start % 32
    pair = stream[..., word] | stream[..., word + 1] << 32
    both = pair >> shift & ((1 << width) - 1)
    return both & (s.centroids - 1), both >> main_bits if s.residuals else None


def _book(parts: Parts, suffix: str, group: int, count: int, length: int) -> torch.Tensor:
    return parts[suffix][group].float().view(count, length)


def _down(vectors: torch.Tensor) -> torch.Tensor:
    """[rows, columns, v] to [rows · v, columns]: a vector runs down its column."""
    return vectors.transpose(1, 2).flatten(0, 1)


def _unsigned(indices: torch.Tensor) -> torch.Tensor:
    """int16 read as uint16; wider integers as they are."""
    return indices.long() & 0xFFFF if indices.dtype == torch.int16 else indices.long()


def _expect_below(index: torch.Tensor, count: int, name: str) -> None:
    expect(int(index.min()) >= 0 and int(index.max()) < count, f"{name} names a vector outside the {count} of its book")


def _log2(count: int) -> int:
    return count.bit_length() - 1 if count > 0 else 0
