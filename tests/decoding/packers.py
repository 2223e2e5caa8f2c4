"""Packs random matrices in each format, and decodes them a second time: numpy, element by element, by other means.

A packer returns the tensors by suffix, the quantization config that goes with them, and the weights [out, in] in
float64. Bit streams are strings of "0" and "1" here, and Hadamard matrices products of explicit ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


class Packed(NamedTuple):
    """One packed matrix: its tensors by suffix, what its config says, and its weights in float64 [out, in]."""

    tensors: Tensors
    config: dict[str, Any]
    weights: np.ndarray


def half(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).half()


def float64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def as_signed(number: int, bits: int) -> int:
    """The two's complement number with these bits."""
    return number - (1 << bits) if number >> (bits - 1) else number


# FP8 and FP4, code by code


def float8_value(code: int) -> float:
    """E4M3, by its definition (OCP 8-bit floating point, bias 7)."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


def float4_value(code: int) -> float:
    """E2M1, by its definition (bias 1)."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    value = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -value if sign else value


def random_float8(rng: np.random.Generator, shape: tuple[int, ...], positive: bool = False) -> tuple[torch.Tensor, Any]:
    """Random finite float8 codes as a tensor, and their values."""
    codes = rng.integers(8, 120, shape) + (0 if positive else 128 * rng.integers(0, 2, shape))
    values = np.vectorize(float8_value)(codes)
    return torch.from_numpy(codes.astype(np.uint8)).view(torch.float8_e4m3fn), values


def fp8(seed: int, out: int, size: int, scale: str = "tensor", method: str = "fp8") -> Packed:
    """FP8. scale: "tensor" ([1]), "number" ([]), "row" ([out, 1]), "vector" ([out]), "block" (32 x 32), "mx"."""
    rng = np.random.default_rng(seed)
    weight, values = random_float8(rng, (out, size))
    config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "static"}
    if method == "modelopt":
        config = {"quant_method": "modelopt", "quant_algo": "FP8"}
    if scale == "mx":
        exponents = rng.integers(115, 121, (out, size // 32)).astype(np.uint8)
        factor = np.repeat(2.0 ** (exponents.astype(float) - 127), 32, axis=1)
        stored = torch.from_numpy(exponents)
    elif scale == "block":
        config["weight_block_size"] = [32, 32]
        stored = torch.from_numpy(rng.uniform(0.001, 0.01, (-(-out // 32), -(-size // 32)))).float()
        factor = np.array([[float(stored[r // 32, c // 32]) for c in range(size)] for r in range(out)])
    else:
        shape = {"tensor": (1,), "number": (), "row": (out, 1), "vector": (out,)}[scale]
        stored = torch.from_numpy(np.asarray(rng.uniform(0.001, 0.01, shape))).float()
        factor = float64(stored).reshape(-1, 1)
    tensors = {".weight": weight, ".weight_scale": stored, ".input_scale": torch.tensor([0.01])}
    return Packed(tensors, config, values * factor)


def nvfp4(seed: int, out: int, size: int, pre_scale: bool = False) -> Packed:
    """NVFP4 as ModelOpt exports it; pre_scale: with AWQ's scales of the inputs."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (out, size))
    packed = np.array([[row[c] + 16 * row[c + 1] for c in range(0, size, 2)] for row in codes], np.uint8)
    scales, scale_values = random_float8(rng, (out, size // 16), positive=True)
    whole = torch.tensor(rng.uniform(0.001, 0.002), dtype=torch.float32)
    weights = np.array([
        [float4_value(codes[r, c]) * scale_values[r, c // 16] * float(whole) for c in range(size)] for r in range(out)
    ])  # fmt: skip
    tensors = {
        ".weight": torch.from_numpy(packed), ".weight_scale": scales, ".weight_scale_2": whole,
        ".input_scale": torch.tensor(0.01),
    }  # fmt: skip
    if pre_scale:
        tensors[".pre_quant_scale"] = half(rng.uniform(0.5, 2, size))
        weights = weights * float64(tensors[".pre_quant_scale"])
    return Packed(tensors, {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ" if pre_scale else "NVFP4"}, weights)


def nvfp4_packed(seed: int, out: int, size: int) -> Packed:
    """NVFP4 as compressed-tensors stores it: the codes have another name, and the scales one divisor."""
    packed = nvfp4(seed, out, size)
    tensors = {suffix: packed.tensors[suffix] for suffix in (".weight_scale",)}
    divisor = torch.tensor([800.0 + seed])
    tensors |= {".weight_packed": packed.tensors[".weight"], ".weight_global_scale": divisor}
    weights = packed.weights / float(packed.tensors[".weight_scale_2"]) / float(divisor)
    return Packed(tensors, {"quant_method": "compressed-tensors"}, weights)


def mxfp4(seed: int, out: int, size: int) -> Packed:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (out, size))
    packed = (codes[:, 0::2] + 16 * codes[:, 1::2]).astype(np.uint8)
    scales = rng.integers(118, 124, (out, size // 32)).astype(np.uint8)
    weights = np.array([
        [float4_value(codes[r, c]) * 2.0 ** (int(scales[r, c // 32]) - 127) for c in range(size)] for r in range(out)
    ])  # fmt: skip
    tensors = {".weight": torch.from_numpy(packed), ".weight_scale": torch.from_numpy(scales)}
    return Packed(tensors, {"quant_method": "modelopt", "quant_algo": "MXFP4"}, weights)


# AQLM


def aqlm(seed: int, out: int, size: int, books: int = 2, bits: int = 8, height: int = 1, width: int = 8) -> Packed:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (out // height, size // width, books))
    books_ = half(rng.normal(0, 0.1, (books, 1 << bits, height, width)))
    scales = half(rng.uniform(0.5, 2, (out // height, 1, 1, 1)))
    table, factor = float64(books_), float64(scales)
    weights = np.zeros((out, size))
    for r in range(out):
        for c in range(size):
            code = codes[r // height, c // width]
            total = sum(table[book, code[book], r % height, c % width] for book in range(books))
            weights[r, c] = factor[r // height, 0, 0, 0] * total
    stored = 8 if bits <= 8 else 16 if bits <= 16 else 32
    signed = np.vectorize(lambda code: as_signed(int(code), bits))(codes).astype(f"int{stored}")
    config = {
        "quant_method": "aqlm", "nbits_per_codebook": bits, "num_codebooks": books, "in_group_size": width,
        "out_group_size": height, "linear_weights_not_to_quantize": ["lm_head.weight"],
    }  # fmt: skip
    return Packed({".codes": torch.from_numpy(signed), ".codebooks": books_, ".scales": scales}, config, weights)


# VPTQ


def bit_words(numbers: list[int], width: int, word: int = 32) -> list[int]:
    """Numbers of `width` bits as signed words: one string of bits, the lowest first, padded with ones."""
    bits = "".join(f"{number:0{width}b}"[::-1] for number in numbers) if width else ""
    bits += "1" * (-len(bits) % word)
    return [as_signed(int(bits[i : i + word][::-1], 2), word) for i in range(0, len(bits), word)]


def vptq(
    seed: int, out: int, size: int, vector: int = 8, main: int = 16, residual: int = 4, groups: int = 1,
    outliers: int = 0, perm: bool = True, norm: bool = True, packed: bool = True,
) -> Packed:  # fmt: skip
    """VPTQ; main, residual: vectors of the codebooks; outliers: input columns with vectors of 4 outputs."""
    rng = np.random.default_rng(seed)
    rows, columns, vector0, main0 = -(-out // vector), (size - outliers) // groups, 4, 8
    order = rng.permutation(size)
    index = rng.integers(0, main, (groups, rows, columns))
    index2 = rng.integers(0, max(residual, 1), (groups, rows, columns))
    books = half(rng.normal(0, 0.2, (groups, main * vector)))
    tensors: Tensors = {".centroids.weight": books}
    if residual:
        tensors[".res_centroids.weight"] = half(rng.normal(0, 0.05, (groups, residual * vector)))
    if packed:
        low, high = main.bit_length() - 1, max(residual, 1).bit_length() - 1
        both = index + (index2 << low)
        words = [[bit_words(list(map(int, row)), low + high) for row in part] for part in both]
        tensors[".indices"] = torch.tensor(words, dtype=torch.int32)
    else:
        tensors[".indices"] = torch.from_numpy(index.astype(np.int16))
        if residual:
            tensors[".res_indices"] = torch.from_numpy(index2.astype(np.int16))
    if outliers:
        index0 = rng.integers(0, main0, (1, -(-out // vector0), outliers))
        tensors[".outlier_indices"] = torch.from_numpy(index0.astype(np.int16))
        tensors[".outlier_centroids.weight"] = half(rng.normal(0, 0.5, (1, main0 * vector0)))
    if perm:
        tensors[".perm"] = torch.from_numpy(order.astype(np.uint16).view(np.int16))
    if norm:
        tensors[".weight_scale"] = half(rng.uniform(0.5, 2, size))
        tensors[".weight_bias"] = half(rng.normal(0, 0.02, size))
    values = {suffix: float64(tensor) for suffix, tensor in tensors.items() if tensor.is_floating_point()}
    weights = np.zeros((out, size))
    for j in range(size):  # column of the stored matrix
        true = int(order[j]) if perm else j
        for r in range(out):
            if j < outliers:
                v = values[".outlier_centroids.weight"][0, int(index0[0, r // vector0, j]) * vector0 + r % vector0]
            else:
                g, c = divmod(j - outliers, columns)
                v = values[".centroids.weight"][g, index[g, r // vector, c] * vector + r % vector]
                if residual:
                    v += values[".res_centroids.weight"][g, index2[g, r // vector, c] * vector + r % vector]
            if norm:
                v = v * values[".weight_scale"][true] + values[".weight_bias"][true]
            weights[r, true] = v
    layer = {
        "bias": False, "enable_norm": norm, "enable_perm": perm, "enable_proxy_error": False, "group_num": groups,
        "group_size": columns, "in_features": size, "out_features": out, "indices_as_float": False,
        "is_indice_packed": packed, "num_centroids": [main0 if outliers else -1, main],
        "num_res_centroids": [-1, residual or -1], "outlier_size": outliers,
        "vector_lens": [vector0 if outliers else -1, vector], "vector_quant_dim": "out",
    }  # fmt: skip
    return Packed(tensors, {"quant_method": "vptq", "layer": layer}, weights)


# Any-Precision


def anyprecision(seed: int, out: int, size: int, low: int = 3, high: int = 6, precision: int | None = None) -> Packed:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << high, (out, size))
    tables = {bits: half(np.sort(rng.normal(0, 0.1, (out, 1 << bits)), 1)) for bits in range(low, high + 1)}
    words = np.zeros((high, out, size // 32), np.uint32)
    for column in range(size):
        chunk, within = divmod(column, 1024)
        length = min(32, size // 32 - 32 * chunk)  # words of the chunk
        j, rest = divmod(within, 8 * length)
        t, k = divmod(rest, 8)
        for plane in range(high):
            bit = codes[:, column] >> (high - 1 - plane) & 1
            words[plane, :, 32 * chunk + t] |= (bit << (31 - 8 * j - k)).astype(np.uint32)
    tensors = {".qweight": torch.from_numpy(words.view(np.int32))}
    tensors |= {f".lut{bits}": table for bits, table in tables.items()}
    bits = precision or high
    table = float64(tables[bits])
    weights = np.array([[table[r, codes[r, c] >> (high - bits)] for c in range(size)] for r in range(out)])
    architecture = {"module_names": [], "model_name": "model", "layers_name": "layers"}
    config = {"seed_precision": low, "parent_precision": high, "group_count": 1, "arch_config": architecture}
    return Packed(tensors, {"quant_method": "anyprec", **config}, weights)


# HQQ


def hqq(seed: int, out: int, size: int, bits: int = 4, group: int = 16, axis: int = 1) -> Packed:
    rng = np.random.default_rng(seed)
    groups = out * size // group
    shape = (groups, group) if axis == 1 else (group, groups)
    codes = rng.integers(0, 1 << bits, shape)
    side = (groups, 1) if axis == 1 else (1, groups)
    scale, zero = half(rng.uniform(0.01, 0.02, side)), half(rng.uniform(0, (1 << bits) - 1, side))
    values = (codes - float64(zero)) * float64(scale)
    name, parts, kind = {
        8: ("8bit_u8", 1, np.uint8), 4: ("4bit_u8", 2, np.uint8), 3: ("3bit_32", 10, np.int32),
        2: ("2bit_u8", 4, np.uint8), 1: ("1bit_u8", 8, np.uint8),
    }[bits]  # fmt: skip
    rows = -(-shape[0] // parts)
    padded = np.zeros((rows * parts, shape[1]), np.int64)
    padded[: shape[0]] = codes
    packed = np.zeros((rows, shape[1]), np.int64)
    for r in range(rows):  # the first part has the highest bits
        for part in range(parts):
            packed[r] = packed[r] * (1 << bits) + padded[part * rows + r]
    number = lambda value: torch.tensor(value, dtype=torch.int32)  # noqa: E731
    flag = lambda value: torch.tensor(value, dtype=torch.uint8)  # noqa: E731
    text = lambda value: torch.tensor(list(value.encode()), dtype=torch.uint8)  # noqa: E731
    tensors = {
        ".W_q": torch.from_numpy(packed.astype(kind)), ".scale": scale, ".zero": zero,
        ".shape": torch.tensor([out, size]), ".nbits": number(bits), ".group_size": number(group),
        ".axis": number(axis), ".packing": text(name), ".compute_dtype": text("torch.float16"),
        ".unpack_view_dtype": text("torch.uint8"),
    }  # fmt: skip
    for key in ("channel_wise", "encoded_state_dict", "optimize", "round_zero", "stores_quant_config"):
        tensors[f".{key}"] = flag(1)
    for key in ("offload_meta", "quant_scale", "quant_zero", "view_as_float"):
        tensors[f".{key}"] = flag(0)
    settings = {"nbits": bits, "group_size": group, "axis": axis}
    config = {"quant_method": "hqq", "quant_config": {"weight_quant_params": settings}}
    return Packed(tensors, config, values.reshape(out, size))


# QTIP: any bits are a valid trellis


def qtip_value(state: int, mode: str, table: np.ndarray, bits: int) -> list[float]:
    """The weights of one state, in Python's integers."""
    if mode == "lut":
        return list(table[state])
    if mode == "quantlut":
        return list(table[(state * (state + 1) >> (16 - bits)) % (1 << bits)])
    if mode == "quantlut_sym":
        product = state * (state + 1)
        first, *others = table[(product >> (15 - bits)) % (1 << bits)]
        return [-first if product >> 15 & 1 else first, *others]
    if mode == "3inst":
        x = ((89226354 * state + 64248484) % (1 << 32)) & 0x8FFF8FFF ^ 0x3B603B60
        halves = np.array([x & 0xFFFF, x >> 16], np.uint16).view(np.float16)
        return [float(np.float16(float(halves[0]) + float(halves[1])))]
    if mode == "1mad":
        x = (34038481 * state + 76625530) % (1 << 32)
    else:
        x = (264435761 * state + 1013904223) % (1 << 32)
        x = ((x * 1664525 >> 32) + x) % (1 << 32)
    return [(sum(x.to_bytes(4, "little")) - 510) / 147.800537109375]


def qtip_rotation(size: int, blocks: int = 1) -> np.ndarray:
    """The rotation of a dimension as an explicit matrix; the cores are those that the checks of `hadamards` pass."""
    from scipy.linalg import block_diag, hadamard

    from lmeval_ext.decoding.hadamards import core, core_order

    order = core_order(size)
    part = size // blocks
    one = np.kron(float64(core(order)), hadamard(part // order)) / np.sqrt(part)
    return np.asarray(block_diag(*[one] * blocks))


def qtip(
    seed: int, out: int, size: int, bits: int = 4, state: int = 12, step: int = 2, mode: str = "quantlut_sym",
    table_bits: int = 9, tile: tuple[int, int] = (16, 16), rcp: int = 0, blocks: int = 8,
) -> Packed:  # fmt: skip
    """QTIP; rcp 1 or 2: inputs or outputs are rotated in `blocks` blocks."""
    rng = np.random.default_rng(seed)
    down, across, weights_per_tile = out // tile[0], size // tile[1], tile[0] * tile[1]
    length = weights_per_tile * bits
    words = rng.integers(-(1 << 15), 1 << 15, (down * across, -(-length // 16))).astype(np.int16)
    table = half(rng.normal(0, 1, (1 << table_bits, step)))
    tensors = {
        ".trellis": torch.from_numpy(words), ".SU": half(rng.choice([-1.0, 1.0], size)),
        ".SV": torch.from_numpy(rng.choice([-0.02, 0.02], out)).float(), ".rcp": torch.tensor(rcp),
        ".tp_rank": torch.tensor(blocks),
    }  # fmt: skip
    if "lut" in mode:
        tensors[".tlut"] = table
    kernel = (mode, state, step, table_bits, tile) == ("quantlut_sym", 16, 2, 9, (16, 16)) and bits in (2, 3, 4)
    raw = np.frombuffer(words.tobytes(), np.uint8)
    inner = np.zeros((out, size))
    value_of = lru_cache(None)(partial(qtip_value, mode=mode, table=float64(table), bits=table_bits))
    for number in range(down * across):
        row, column = divmod(number, across)
        if kernel:
            fields = raw.reshape(out // 32, size // 32, 32, 2, 2, bits)[row // 2, column // 2, :, column % 2, row % 2]
            ring = "".join(f"{byte:08b}" for s in range(32) for byte in fields[s][::-1])
        else:
            ring = "".join(f"{int(word) & 0xFFFF:016b}" for word in words[number])[:length]
        around = ring + ring
        for t in range(weights_per_tile // step):
            start = t * bits * step
            for u, value in enumerate(value_of(int(around[start : start + state], 2))):
                p = t * step + u
                place = divmod(p, tile[1])
                if kernel:
                    place = ((p >> 5) + 8 * (p >> 1 & 1), 2 * (p >> 3 & 3) + (p & 1) + 8 * (p >> 2 & 1))
                inner[row * tile[0] + place[0], column * tile[1] + place[1]] = value
    left = qtip_rotation(out, blocks if rcp == 2 else 1)
    right = qtip_rotation(size, blocks if rcp == 1 else 1)
    weights = float64(tensors[".SV"])[:, None] * (left @ inner @ right.T) * float64(tensors[".SU"])
    config = {
        "codebook": "bitshift", "codebook_version": 0, "L": state, "K": bits, "V": step, "td_x": tile[0],
        "td_y": tile[1], "decode_mode": mode, "tlut_bits": table_bits, "split_for_tp": False, "skip_list": None,
    }  # fmt: skip
    return Packed(tensors, {"quant_method": "qtip", **config}, weights)


PACKERS: dict[str, Callable[..., Packed]] = {
    "fp8": fp8, "fp8-modelopt": lambda seed, out, size: fp8(seed, out, size, "number", "modelopt"),
    "nvfp4": nvfp4, "aqlm": aqlm, "vptq": vptq, "anyprec": anyprecision, "hqq": hqq,
    "qtip": qtip,
}  # fmt: skip


def quantized_checkpoint(folder: Path, kind: str, **settings: Any) -> dict[str, np.ndarray]:
    """Replace the projections of a stored Llama by random ones in a format; return their weights by name.

    kind: a key of `PACKERS`. settings: arguments of the packer.
    """
    stored = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    dense, layers, quantization = {}, {}, {}
    names = [name for name in stored if name.endswith("_proj.weight")]
    for seed, name in enumerate(sorted(names)):
        base = name.removesuffix(".weight")
        packed = (PACKERS.get(kind) or globals()[kind])(seed, *stored.pop(name).shape, **settings)
        stored |= {base + suffix: tensor.contiguous() for suffix, tensor in packed.tensors.items()}
        dense[name], quantization = packed.weights, dict(packed.config)
        layers[base] = quantization.pop("layer", None)
    method = quantization["quant_method"]
    if method == "vptq":
        quantization["config_for_layers"] = layers
    if method in ("qtip", "anyprec"):
        del quantization["quant_method"]
    config[{"qtip": "quip_params", "anyprec": "anyprec"}.get(method, "quantization_config")] = quantization
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return dense
