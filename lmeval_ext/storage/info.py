"""The result of `inspect`, one frozen record per checkpoint, and the errors that it raises instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmeval_ext.errors import UserError

DOWNLOAD_AGAIN = "Download the file again."
_NAMES_IN_A_MESSAGE = 5


class StorageError(UserError):
    """A checkpoint cannot be read. The message names the file, what is wrong with it and the fix."""


def unreadable(path: Path, error: OSError) -> StorageError:
    """Return the error for a file that the operating system cannot open or read."""
    return StorageError(f"{path} cannot be read: {error.strerror}. Check the path and its permissions.")


def parts_missing(place: Path, missing: Sequence[str], total: int, kind: str) -> StorageError:
    """Return the error for a checkpoint of `total` files of which `missing` do not exist.

    place: the folder or file that was asked for. kind: the word for these files, "shards" or "parts".
    """
    names = ", ".join(missing[:_NAMES_IN_A_MESSAGE]) + (", …" if len(missing) > _NAMES_IN_A_MESSAGE else "")
    return StorageError(f"{place}: {len(missing)} of {total} {kind} are missing ({names}). Download them.")


@dataclass(frozen=True)
class Excluded:
    """Tensors that count neither in the layer figure nor in the head figure.

    kind: "embedding", "router" (MoE gates), "vision" (all that lies outside the decoder: towers, projectors), "draft"
    (MTP, EAGLE or Medusa layers), "other" (norms, biases, buffers) or "unknown" (matrices beside the decoder's layers
    that nothing assigns to a part; then the layer figures are None).
    bits: stored bits, every overhead included. elements: logical elements, None if the packing is unknown.
    """

    kind: str
    bits: int
    elements: int | None


@dataclass(frozen=True)
class StorageInfo:
    """Bits per weight and bytes of a checkpoint, read from its headers alone.

    Convention, the same for every format:

    - `layer_bpw`: stored bits of the weight matrices (two or more dimensions) other than embeddings and output head,
      divided by their logical elements. The bits include every overhead of the format: scales, zero points,
      codebooks, sign vectors, group indices, global scales. Left out: embeddings, norms, biases, MoE router gates,
      vision and audio towers, draft layers. ExLlamaV3 defines the figure this way (`exllamav3/model/model.py`,
      `get_storage_info`), but also counts biases and router gates, so the two agree on Llama-like models only. Rows
      that a format adds as padding (ExLlamaV3 pads a vocabulary to a multiple of 128) count as elements, as in
      ExLlamaV3.
    - `head_bpw`: the same for the output matrix, or for the token embedding matrix of a tied model.
    - `vram_gb`: (layer_bits + head_bits) / 8 / 1024**3, in GiB as on ExLlamaV3's plots. It leaves out embeddings and
      the KV cache, so it is less than the memory that a GPU needs.
    - `file_bpw`: all tensor bits divided by all logical elements, norms, biases and embeddings included. This is
      llama.cpp's convention ("BPW" of `llama-quantize` and `llama_model_size / llama_model_n_params`). Never plot it
      on one axis with `layer_bpw`.
    - `weight_bytes`: bytes of all tensors; headers and padding between tensors are not counted.

    Other fields: `family` and `scheme` name the packing ("NVFP4", "nvfp4a16"). `tied`: whether the embedding matrix
    is also the output matrix. `layer_bits`, `layer_elements`, `head_bits`, `head_elements` and `elements` (all logical
    elements) are the sums behind the ratios. `excluded` holds everything else, so that layer_bits + head_bits + the
    excluded bits equals 8 * weight_bytes where all are known. A figure that cannot be known is None, and `notes` gives
    the reason: layer_bits is None wherever layer_elements is, and head_bits wherever there is no known output matrix.
    """

    layer_bpw: float | None
    head_bpw: float | None
    vram_gb: float | None
    file_bpw: float | None
    weight_bytes: int
    family: str | None
    scheme: str | None
    tied: bool | None
    layer_bits: int | None
    layer_elements: int | None
    head_bits: int | None
    head_elements: int | None
    elements: int | None
    excluded: tuple[Excluded, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON types (lists for tuples, None for unknown figures)."""
        record = asdict(self)
        record["excluded"] = [asdict(part) for part in self.excluded]
        record["notes"] = list(self.notes)
        return record
