"""Checks whether a stored reference fits a model: tokenizer, vocabulary and windows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lmeval_ext.divergence.measured_model import MeasuredModel
from lmeval_ext.divergence.store import ReferenceStore
from lmeval_ext.errors import UserError
from lmeval_ext.requests import WindowRequest
from lmeval_ext.tokens import PROBE, HFTokenizer

# Models pad their vocabulary to multiples of 64 to 512, some further (Phi-2: 51,200 for 50,295)
PADDING = 1024


def check_fit(model: MeasuredModel, store: ReferenceStore, windows: dict[str, WindowRequest]) -> int:
    """Return the size of the vocabulary that both have.

    windows: by key. Raises UserError if tokenizer, vocabulary or windows do not fit the store.
    """
    manifest, argument = store.manifest, f"reference={store.folder}"
    missing = [w for key, w in windows.items() if key not in store]
    comparable = model.tokenizer_may_differ and not missing  # the windows are of the reference's own tokens
    if not comparable and any(manifest.tokenizer_probe != ids for ids in probes(model)):
        raise UserError(
            f"{argument}: the reference {manifest.describe()} has another tokenizer than this model; divergence is "
            "defined between distributions over the same tokens: use a reference of the same model family"
        )
    if missing and not len(store):
        raise UserError(
            f"{argument}: holds no window, because the run that was to write it failed before the first; run "
            "the same task and --metadata with save_reference= again"
        )
    if missing:
        raise UserError(
            f"{argument}: holds {len(store)} windows, but not {len(missing)} of the {len(windows)} of this task "
            f"(first: {missing[0].arguments[0]}): their text, eval_len, stride, max_rows or bos is different. Run the "
            "same task and --metadata with save_reference= first"
        )
    model_size, reference_size = model.vocabulary, manifest.vocabulary
    common, largest = min(model_size, reference_size), max(max(w.ids) for w in windows.values())
    if abs(model_size - reference_size) >= PADDING or largest >= common:
        raise UserError(
            f"{argument}: the reference has a vocabulary of {reference_size} tokens, this model {model_size}; they "
            "differ by more than padding, so the distributions are not over the same tokens; use a reference of the "
            "same model family"
        )
    return common


def probe(model: MeasuredModel) -> list[int]:
    """Token ids of `PROBE`, by which a store recognizes the tokenizer."""
    return [int(i) for i in model.tok_encode(PROBE, add_special_tokens=False)]


def probes(model: MeasuredModel) -> Iterator[list[int]]:
    """Token ids of `PROBE` by the tokenizer in use, and by the checkpoint's own tokenizer if that is another."""
    yield probe(model)
    path, used = model.checkpoint(), getattr(getattr(model, "tokenizer", None), "name_or_path", None)
    if path is None or not (Path(path) / "tokenizer.json").is_file():
        return
    if used is None or Path(used).resolve() != Path(path).resolve():
        yield HFTokenizer(path).encode(PROBE).ids.tolist()
