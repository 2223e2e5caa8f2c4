"""Turns a Llama checkpoint into another one that computes the same function with quite different weights.

The weights of `make_model.py` were once 4-bit, and a format with a similar grid would nearly repeat them. After a
rotation no weight lies on that grid, so every format has to round weights that it has not seen. The steps are those of
QuaRot (arXiv 2404.00456, section 4), without its online Hadamard transforms:

- each norm's gain is folded into the matrices that read its output, and an output matrix tied to the embedding is
  stored apart, because it takes the last norm's gain;
- the residual stream, filled with zeros to a multiple of 256, is turned by one random orthogonal matrix. RMSNorm
  without gains commutes with it; it divides by the mean square over more channels than before, so matrices and epsilon
  are scaled as in `make_model.widen`;
- the values of each key/value head are turned by a random orthogonal matrix, and the columns of the output projection
  of the heads that read it turned back;
- queries and keys of each key/value head are turned by one random angle per frequency of the rotary embedding, whose
  own rotations in the same planes commute with it;
- where the width needs more heads, a key/value head is repeated with the query heads that read it, and every copy gets
  its own rotations and an equal share of the output: no head is empty.

All arithmetic is in float64; the result is rounded once, to `dtype`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from outputs import UsageError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

SEED = 20260101
EMBEDDING, HEAD, LAST_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Returns a random orthogonal matrix, float64 [size, size], drawn uniformly (Mezzadri, math-ph/0609050)."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def turn_pairs(head: Tensor, angles: Tensor) -> Tensor:
    """Returns the rows [head_dim, in] of one head, rows i and i + head_dim / 2 turned by angles[i].

    These are the planes in which the rotary embedding of Transformers' Llama turns queries and keys.
    """
    low, high = head.chunk(2)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([cos * low - sin * high, sin * low + cos * high])


class Rotation:
    """The rotations of one model, and its sizes.

    config: config.json of the model. multiple: what the new widths are multiples of.
    """

    def __init__(self, config: dict[str, Any], multiple: int, seed: int) -> None:
        if (
            config.get("architectures") != ["LlamaForCausalLM"]
            or config.get("attention_bias")
            or config.get("mlp_bias")
        ):
            raise UsageError("only a LlamaForCausalLM without biases can be rotated")
        self.hidden = config["hidden_size"]
        self.wide = math.ceil(self.hidden / multiple) * multiple
        self.head_dim = config.get("head_dim") or self.hidden // config["num_attention_heads"]
        sources = config["num_key_value_heads"]
        self.group = config["num_attention_heads"] // sources
        count = sources
        while (count * self.head_dim) % multiple:
            count += 1
        self.sources = [number % sources for number in range(count)]  # the old key/value head of each new one
        self.epsilon = config["rms_norm_eps"] * self.hidden / self.wide
        self._generator = torch.Generator().manual_seed(seed)
        # The first columns only: the others meet zeros
        self._stream = orthogonal(self.wide, self._generator)[:, : self.hidden]

    def write(self, stream: Tensor) -> Tensor:
        """Turns what is added to the residual stream: [hidden, …] to [wide, …]."""
        return self._stream @ stream

    def read(self, weight: Tensor, gain: Tensor) -> Tensor:
        """Turns a matrix that reads the normed residual stream: [out, hidden] to [out, wide]."""
        return weight * gain * math.sqrt(self.hidden / self.wide) @ self._stream.T

    def attention(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Turns the heads of one layer: rows of q, k and v, columns of o; float64, other sides as they are."""
        queries, keys, values, outputs = [], [], [], []
        columns = self.group * self.head_dim
        for source in self.sources:
            angles = torch.rand(self.head_dim // 2, generator=self._generator, dtype=torch.float64) * 2 * math.pi
            turn = orthogonal(self.head_dim, self._generator) / math.sqrt(self.sources.count(source))
            own = slice(source * self.head_dim, (source + 1) * self.head_dim)
            readers = slice(source * columns, (source + 1) * columns)
            keys.append(turn_pairs(k[own], angles))
            values.append(turn @ v[own])
            queries += [turn_pairs(head, angles) for head in q[readers].split(self.head_dim)]
            outputs += [head @ turn.T for head in o[:, readers].split(self.head_dim, dim=1)]
        return torch.cat(queries), torch.cat(keys), torch.cat(values), torch.cat(outputs, dim=1)


def rotated(tensors: dict[str, Tensor], config: dict[str, Any], rotation: Rotation) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of the rotated model in float64, layer by layer."""
    old = {name: tensor.double() for name, tensor in tensors.items()}
    yield EMBEDDING, rotation.write(old[EMBEDDING].T).T
    for layer in tqdm(range(config["num_hidden_layers"]), desc="rotating", unit="layer"):
        below = f"model.layers.{layer}."
        norm = old[f"{below}input_layernorm.weight"]
        q, k, v, o = (old[f"{below}self_attn.{name}_proj.weight"] for name in "qkvo")
        q, k, v, o = rotation.attention(q, k, v, o)
        for name, matrix in (("q", q), ("k", k), ("v", v)):
            yield f"{below}self_attn.{name}_proj.weight", rotation.read(matrix, norm)
        yield f"{below}self_attn.o_proj.weight", rotation.write(o)
        norm = old[f"{below}post_attention_layernorm.weight"]
        for name in ("gate", "up"):
            yield f"{below}mlp.{name}_proj.weight", rotation.read(old[f"{below}mlp.{name}_proj.weight"], norm)
        yield f"{below}mlp.down_proj.weight", rotation.write(old[f"{below}mlp.down_proj.weight"])
        for name in ("input", "post_attention"):
            yield f"{below}{name}_layernorm.weight", torch.ones(rotation.wide, dtype=torch.float64)
    yield LAST_NORM, torch.ones(rotation.wide, dtype=torch.float64)
    yield HEAD, rotation.read(old.get(HEAD, old[EMBEDDING]), old[LAST_NORM])


def rotate(
    source: Path, folder: Path, multiple: int = 256, seed: int = SEED, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Writes the rotated form of the checkpoint `source`, stored in `dtype`, into `folder`."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    rotation = Rotation(config, multiple, seed)
    tensors = {
        name: tensor.to(dtype).contiguous()
        for name, tensor in rotated(load_file(source / "model.safetensors"), config, rotation)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for path in source.iterdir():
        if path.name != "model.safetensors":
            shutil.copy(path, folder)
    name = str(dtype).removeprefix("torch.")
    config |= {
        "hidden_size": rotation.wide,
        "num_attention_heads": len(rotation.sources) * rotation.group,
        "num_key_value_heads": len(rotation.sources),
        "head_dim": rotation.head_dim,
        "rms_norm_eps": rotation.epsilon,
        "tie_word_embeddings": False,
        "dtype": name,
        "torch_dtype": name,
    }
    (folder / "config.json").write_text(json.dumps(config, ensure_ascii=False, indent=1), encoding="utf-8")
