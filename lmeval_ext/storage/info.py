"""What `inspect` hands out: one frozen record per checkpoint, and the error it raises instead."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lmeval_ext.errors import UserError


class StorageError(UserError):
    """A checkpoint that cannot be read. The message names the file, what is wrong with it and the fix."""


@dataclass(frozen=True)
class Excluded:
    """Tensors left out of both the layer and the head figure.

    kind: "embedding", "router" (MoE gates), "vision" (towers and projectors of other modalities), "draft"
    (MTP, EAGLE or Medusa layers) or "other" (norms, biases, buffers).
    bits: stored bits, with every overhead. elements: logical elements, None when the packing is unknown.
    """

    kind: str
    bits: int
    elements: int | None


@dataclass(frozen=True)
class StorageInfo:
    """Bits per weight and bytes of a checkpoint, read from its headers alone.

    Convention, the same for every format:

    - `layer_bpw`: stored bits of the weight matrices (two or more dimensions) outside embedding and output head,
      with every overhead of the format (scales, zero points, codebooks, sign vectors, group indices, global
      scales), over their logical element count. Left out: embeddings, norms, biases, MoE router gates, vision and
      audio towers, draft layers. This is the figure of ExLlamaV3 (`exllamav3/model/model.py`, `get_storage_info`),
      which also counts biases and router gates, so the two agree on Llama-like models only. Rows that a format adds
      as padding (ExLlamaV3 pads a vocabulary to a multiple of 128) count as elements, as they do there.
    - `head_bpw`: the same for the output matrix, or for the token embedding matrix of a tied model.
    - `vram_gb`: (layer_bits + head_bits) / 8 / 1024**3, in GiB as on ExLlamaV3's plots. No embeddings and no KV
      cache: it is not what a GPU must hold.
    - `file_bpw`: all tensor bits over all logical elements, norms, biases and embeddings included. That is
      llama.cpp's convention ("BPW" of `llama-quantize` and `llama_model_size / llama_model_n_params`). Never put
      it on one axis with `layer_bpw`.
    - `weight_bytes`: bytes of all tensors; headers and padding between tensors are not counted.

    Other fields: `family` and `scheme` are the names of the packing ("NVFP4", "nvfp4a16"); `tied` says whether the
    embedding matrix serves as output matrix; `layer_bits`, `layer_elements`, `head_bits`, `head_elements` and
    `elements` (all logical elements) are the sums behind the ratios; `excluded` accounts for everything else, so
    that layer_bits + head_bits + the excluded bits is 8 * weight_bytes. A figure that cannot be known is None, and
    `notes` says why.
    """

    layer_bpw: float | None
    head_bpw: float | None
    vram_gb: float | None
    file_bpw: float | None
    weight_bytes: int
    family: str | None
    scheme: str | None
    tied: bool | None
    layer_bits: int
    layer_elements: int | None
    head_bits: int
    head_elements: int | None
    elements: int | None
    excluded: tuple[Excluded, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON types (lists for tuples, None for unknown figures)."""
        record = asdict(self)
        record["excluded"] = [asdict(part) for part in self.excluded]
        record["notes"] = list(self.notes)
        return record
