"""Says what to observe while windows are scored, in plain types, since an engine may run in other processes."""

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
    """One observation of windows.

    folder: the store's. save: whether to write the store or to measure against it. mode: "hidden" or "logits".
    vocabulary: columns of the softmax, the model's or those in common. chunk: tokens at a time, None for the default.
    keys: of the windows to be measured, in order; empty for `save`.
    """

    folder: str
    save: bool
    mode: str
    vocabulary: int
    chunk: int | None = None
    keys: tuple[str, ...] = ()

    def observer(self, head: OutputHead | None = None, device: torch.device | None = None) -> Saving | Comparing:
        """Make the observer.

        head: the model's, cut to the vocabulary, if `needs_head`. device: where logits will be, if that is known.
        """
        if self.save:
            return Saving(head, self.vocabulary, self.chunk)
        store = ReferenceStore.open(self.folder)
        if self.mode != "hidden":
            return Comparing(Windows(store, self.keys), None, self.vocabulary, self.chunk)
        upload = Upload(device) if device is not None and device.type == "cuda" else None
        pool = ThreadPoolExecutor(1)  # reading the head takes as long as a small model's first step
        head_read = pool.submit(lambda: _uploaded(store.head(), upload))
        pool.shutdown(wait=False)
        return Comparing(Windows(store, self.keys), head_read.result, self.vocabulary, self.chunk, upload)

    @property
    def needs_head(self) -> bool:
        """Whether the model's output matrix is to be stored."""
        return self.save and self.mode == "hidden"


def cut_head(head: OutputHead, vocabulary: int) -> OutputHead:
    """The head of the first `vocabulary` tokens, without an engine's padding."""
    bias = None if head.bias is None else head.bias[:vocabulary]
    return OutputHead(head.weight[:vocabulary], bias, head.softcap, head.scale)


def head_facts(head: OutputHead) -> dict[str, Any]:
    """The fields of `Manifest` that describe an output matrix."""
    return {
        "width": int(head.weight.shape[1]),
        "softcap": head.softcap,
        "scale": head.scale,
        "head_sha256": tensors_sha256(head.tensors()),
    }


def _uploaded(head: OutputHead, upload: Upload | None) -> OutputHead:
    """The head on the GPU, or unchanged if memory is short: the scoring then frees memory and copies it itself."""
    try:
        return head if upload is None else upload.copied(head)
    except RuntimeError:  # includes torch.cuda.OutOfMemoryError and errors from drivers
        return head
