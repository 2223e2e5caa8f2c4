"""What to look at while windows are scored, in plain types: an adapter's engine may run in other processes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from lmeval_ext.divergence.head import OutputHead
from lmeval_ext.divergence.observer import Comparing, Saving, Upload
from lmeval_ext.divergence.read_ahead import Windows
from lmeval_ext.divergence.store import ReferenceStore
from lmeval_ext.divergence.store_files import tensors_sha256


@dataclass(frozen=True)
class ObservationPlan:
    """folder: of the store. save: write it, or measure against it. mode: "hidden" or "logits". vocabulary: columns of
    the softmax, the model's own or those in common. chunk: tokens at a time, None for the default. keys: of the
    windows to come, where they are measured."""

    folder: str
    save: bool
    mode: str
    vocabulary: int
    chunk: int | None = None
    keys: tuple[str, ...] = ()

    def observer(self, head: OutputHead | None = None, device: torch.device | None = None) -> Saving | Comparing:
        """head: the model's own, cut to the vocabulary, where hidden states are to be saved. device: where logits will
        be, if that is known."""
        if self.save:
            return Saving(head, self.vocabulary, self.chunk)
        store = ReferenceStore.open(self.folder)
        if self.mode != "hidden":
            return Comparing(Windows(store, self.keys), None, self.vocabulary, self.chunk)
        upload = Upload(device) if device is not None and device.type == "cuda" else None
        pool = ThreadPoolExecutor(1)  # what it does takes as long as a small model takes for its first step
        given = pool.submit(lambda: _uploaded(store.head(), upload))
        pool.shutdown(wait=False)
        return Comparing(Windows(store, self.keys), given.result, self.vocabulary, self.chunk, upload)

    @property
    def needs_head(self) -> bool:
        return self.save and self.mode == "hidden"


def _uploaded(head: OutputHead, upload: Upload | None) -> OutputHead:
    """The head on the GPU; as it was where there is no room, which the scoring has to make, and then tries again."""
    try:
        return head if upload is None else upload.copied(head)
    except RuntimeError:  # torch.cuda.OutOfMemoryError is one; drivers have others
        return head


def cut_head(head: OutputHead, vocabulary: int) -> OutputHead:
    """Without an engine's padding."""
    bias = None if head.bias is None else head.bias[:vocabulary]
    return OutputHead(head.weight[:vocabulary], bias, head.softcap, head.scale)


def head_facts(head: OutputHead) -> dict[str, Any]:
    """The fields of `Manifest` that describe it."""
    return {
        "width": int(head.weight.shape[1]),
        "softcap": head.softcap,
        "scale": head.scale,
        "head_sha256": tensors_sha256(head.tensors()),
    }
