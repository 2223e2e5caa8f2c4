"""One scoring of windows with `save_reference=` or `reference=`: what is checked, done, and added."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from lmeval_ext.divergence.plan import Plan
from lmeval_ext.divergence.store import Manifest, ReferenceStore, StoredWindow, window_key
from lmeval_ext.errors import UserError
from lmeval_ext.requests import WindowRequest, WindowScores

if TYPE_CHECKING:
    from lmeval_ext.models.base import WindowScoring

logger = logging.getLogger(__name__)

# Models round their matrices up to multiples of 64 to 512, some further (Phi-2: 51,200 for 50,295)
PADDING = 1024
# Windows between which a save run writes: what an interruption can cost
GROUP = 32
# Nats a token. 16-bit logits are off by 1e-6 to 1e-4; a forgotten scale or softcap by more than this
_NOT_THE_HEAD = 0.01
# Digits, scripts, spaces, code: what tokenizers of different models cut differently
PROBE = (
    "In 1984, naïve cafés — l'été, größer, Привет мир, 你好世界, नमस्ते:\n\n\tdef f(x): return x**2 != 12345.678  # 🙂"
)


def score(model: WindowScoring, windows: Sequence[WindowRequest]) -> list[WindowScores]:
    """Scores of the windows, with `divergence`. UserError where the reference does not fit, before anything is run."""
    by_key = {window_key(w.ids, len(w.context_ids)): w for w in windows}
    arguments = model.reference_arguments
    found = _save(model, by_key) if arguments.save_reference else _compare(model, by_key)
    return [found[window_key(w.ids, len(w.context_ids))] for w in windows]


# ---------------------------------------------------------------------- measuring against a store


def _compare(model: WindowScoring, windows: dict[str, WindowRequest]) -> dict[str, WindowScores]:
    arguments = model.reference_arguments
    store = ReferenceStore.open(str(arguments.reference))
    common = check_fit(model, store, windows)
    plan = Plan(str(store.folder), False, store.manifest.mode, common, arguments.reference_chunk, tuple(windows))
    model.observe_windows(plan)
    try:
        scores = model.score_windows(list(windows.values()))
    finally:
        model.stop_observing()
    rounding = {key: _rounding(store, key) for key in windows}
    return {
        key: _with_reference(found, store.manifest, "comparison", common, rounding[key])
        for key, found in zip(windows, scores, strict=True)
    }


def check_fit(model: WindowScoring, store: ReferenceStore, windows: dict[str, WindowRequest]) -> int:
    """The vocabulary that both have. UserError where tokenizer, vocabulary or windows are others than the store's."""
    said, what = store.manifest, f"reference={store.folder}"
    missing = [w for key, w in windows.items() if key not in store]
    if missing and said.tokenizer_probe != probe(model):
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


# ---------------------------------------------------------------------- writing a store


def _save(model: WindowScoring, windows: dict[str, WindowRequest]) -> dict[str, WindowScores]:
    arguments = model.reference_arguments
    folder, mode = Path(str(arguments.save_reference)), _mode(model)
    plan = Plan(str(folder), True, mode, model.vocabulary, arguments.reference_chunk)
    facts = model.observe_windows(plan)
    try:
        about = model.describe()
        manifest = Manifest(
            model={
                "label": about.label,
                "engine": about.engine,
                "engine_version": about.engine_version,
                "dtype": about.dtype,
                "weights_sha256": weights_sha256(model.checkpoint()),
            },
            mode=mode,
            vocabulary=model.vocabulary,
            tokenizer_probe=probe(model),
            **facts,
        )
        store = ReferenceStore.create(folder, manifest)
        found = _kept(store, windows)
        todo = [key for key in windows if key not in found]
        if found:
            logger.warning("save_reference=%s: %d of %d windows are there already", folder, len(found), len(windows))
        with tqdm(
            total=len(windows), initial=len(found), desc=f"Scoring windows ({model.label})", unit="window"
        ) as bar:
            model.bar = bar
            for start in range(0, len(todo), GROUP):
                keys = todo[start : start + GROUP]
                scores = dict(zip(keys, model.score_windows([windows[key] for key in keys]), strict=True))
                _check_distributions(scores, model, mode)
                if mode == "hidden" and not store.has_head():
                    model.write_head(store)
                for key, (states, own) in _stored(model, scores).items():
                    store.write(StoredWindow(key, states, own))
                    found[key] = scores[key]
    finally:
        model.bar = None
        model.stop_observing()
    _say_size(store, windows)
    return {
        key: _with_reference(s, store.manifest, "reference", model.vocabulary, _rounding(store, key))
        for key, s in found.items()
    }


def _mode(model: WindowScoring) -> str:
    asked = model.reference_arguments.reference_mode
    if asked is not None and asked not in model.reference_modes:
        raise UserError(
            f"reference_mode={asked}: this engine shows no hidden states; leave it out to store coded logits"
        )
    return asked or model.reference_modes[0]


def _kept(store: ReferenceStore, windows: dict[str, WindowRequest]) -> dict[str, WindowScores]:
    """Scores of the windows that are in the store; a damaged one counts as missing, and is written again."""
    found = {}
    for key in windows:
        if key not in store:
            continue
        try:
            window = store.read(key)
        except UserError as error:
            logger.warning("written again: %s", error)
            continue
        own = {name: t.numpy() for name, t in window.scores.items()}
        found[key] = WindowScores.of(own["logprobs"], own["greedy"], _divergence_of(own))
    if found and store.manifest.mode == "hidden":
        store.head()  # raises if it is damaged: all windows rest on it
    return found


def _divergence_of(own: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: own[name] for name in ("kld", "agree", "reference_logprobs", "confidence")}


def _stored(
    model: WindowScoring, scores: dict[str, WindowScores]
) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """States and scores of each window, as a store keeps them."""
    states = model.take_states({key: len(s.logprobs) for key, s in scores.items()})
    result = {}
    for key, found in scores.items():
        said = found.divergence or {}
        own = {
            "logprobs": torch.tensor(found.logprobs, dtype=torch.float32),
            "greedy": torch.tensor(found.greedy, dtype=torch.bool),
            "agree": torch.tensor(said["agree"], dtype=torch.bool),
            **{
                name: torch.tensor(said[name], dtype=torch.float32)
                for name in ("kld", "reference_logprobs", "confidence")
            },
        }
        result[key] = (states[key], own)
    return result


def _check_distributions(scores: dict[str, WindowScores], model: WindowScoring, mode: str) -> None:
    """There must be some, and hidden states × output matrix must give the model's own logits, up to their rounding."""
    kld = np.concatenate([np.asarray((s.divergence or {})["kld"], np.float64) for s in scores.values()])
    if not np.isfinite(kld).all():
        raise UserError(
            f"{model.label}: {int((~np.isfinite(kld)).sum())} of {len(kld)} distributions are not finite; such a model "
            "is no reference (damaged weights, or a dtype that overflows)"
        )
    if mode == "hidden" and kld.mean() > _NOT_THE_HEAD:
        raise UserError(
            f"{model.label}: hidden states times output matrix do not give this model's logits (mean divergence "
            f"{kld.mean():.3g}): its head does something that is not known here; use reference_mode=logits"
        )


def _say_size(store: ReferenceStore, windows: dict[str, WindowRequest]) -> None:
    tokens = sum(len(w.target_ids) for w in windows.values())
    size = sum(path.stat().st_size for path in store.folder.rglob("*.safetensors"))
    logits = tokens * store.manifest.vocabulary * 4
    logger.warning(
        "reference written to %s: %d windows, %d scored tokens, %.1f MB in all; their logits in float32 are %.1f MB, "
        "%.1f times as much",
        store.folder,
        len(windows),
        tokens,
        size / 1e6,
        logits / 1e6,
        logits / size,
    )


# ---------------------------------------------------------------------- what both add


def _rounding(store: ReferenceStore, key: str) -> dict[str, float]:
    """Divergence of the reference's own engine from what is stored, over one window."""
    kld = store.own_kld(key).double()
    return {"kld_sum": float(kld.sum()), "kld_max": float(kld.max())}


def _with_reference(
    scores: WindowScores, manifest: Manifest, role: str, vocabulary: int, rounding: dict[str, float]
) -> WindowScores:
    m = manifest.model
    about = {
        "id": manifest.id,
        "label": m.get("label"),
        "engine": m.get("engine"),
        "engine_version": m.get("engine_version"),
        "dtype": m.get("dtype"),
        "mode": manifest.mode,
        "role": role,
        "vocabulary": vocabulary,
        "rounding": rounding,
    }
    return scores._replace(divergence={**(scores.divergence or {}), "reference": about})


def probe(model: Any) -> list[int]:
    """Token ids of `PROBE`."""
    return [int(i) for i in model.tok_encode(PROBE, add_special_tokens=False)]


def weights_sha256(path: str | None) -> str | None:
    """Of a checkpoint's weight files: names, sizes and samples of their bytes (whole files would take minutes)."""
    if path is None:
        return None
    root = Path(path)
    files = sorted(p for p in root.iterdir() if p.suffix in (".safetensors", ".gguf")) if root.is_dir() else [root]
    digest = hashlib.sha256()
    piece, pieces = 1 << 16, 64
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for i in range(pieces):
                stream.seek(max(0, size - piece) * i // (pieces - 1))
                digest.update(stream.read(piece))
    return digest.hexdigest()
