"""Whether a stored reference fits a model: tokenizer, vocabulary and windows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lmeval_ext.divergence.measured_model import MeasuredModel
from lmeval_ext.divergence.store import ReferenceStore
from lmeval_ext.errors import UserError
from lmeval_ext.requests import WindowRequest
from lmeval_ext.tokens import HFTokenizer

# Models round their matrices up to multiples of 64 to 512, some further (Phi-2: 51,200 for 50,295)
PADDING = 1024


# Digits, scripts, spaces, code: what tokenizers of different models cut differently
PROBE = (
    "In 1984, naïve cafés — l'été, größer, Привет мир, 你好世界, नमस्ते:\n\n\tdef f(x): return x**2 != 12345.678  # 🙂"
)


def check_fit(model: MeasuredModel, store: ReferenceStore, windows: dict[str, WindowRequest]) -> int:
    """The vocabulary that both have. UserError where tokenizer, vocabulary or windows are others than the store's."""
    said, what = store.manifest, f"reference={store.folder}"
    missing = [w for key, w in windows.items() if key not in store]
    if (missing or not model.tokenizer_may_differ) and any(said.tokenizer_probe != p for p in probes(model)):
        raise UserError(
            f"{what}: the reference {said.describe()} has another tokenizer than this model; divergence is between "
            "distributions over the same tokens: use a reference of the same model family"
        )
    if missing:
        raise UserError(
            f"{what}: holds {len(store)} windows, but not {len(missing)} of the {len(windows)} of this task (first: "
            f"{missing[0].arguments[0]}): they are over another text, eval_len, stride, max_rows or bos. Run the same "
            "task and --metadata with save_reference= first"
        )
    ours, theirs = model.vocabulary, said.vocabulary
    largest = max(max(w.ids) for w in windows.values())
    if abs(ours - theirs) >= PADDING or largest >= min(ours, theirs):
        raise UserError(
            f"{what}: the reference has a vocabulary of {theirs} tokens, this model {ours}; they differ by more than "
            "padding, so the distributions are not over the same tokens"
        )
    return min(ours, theirs)


def probe(model: MeasuredModel) -> list[int]:
    """Token ids of `PROBE`."""
    return [int(i) for i in model.tok_encode(PROBE, add_special_tokens=False)]


def probes(model: MeasuredModel) -> Iterator[list[int]]:
    """Of the tokenizer that is used, and of the checkpoint's own where that is another."""
    yield probe(model)
    path, used = model.checkpoint(), getattr(getattr(model, "tokenizer", None), "name_or_path", None)
    if path is None or not (Path(path) / "tokenizer.json").is_file():
        return
    if used is None or Path(used).resolve() != Path(path).resolve():
        yield HFTokenizer(path).encode(PROBE).ids.tolist()
