"""One scoring of windows with `save_reference=` or `reference=`: what is checked, done, and added."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from lmeval_ext.divergence.fit import check_fit, probe
from lmeval_ext.divergence.logits_code import EXACT
from lmeval_ext.divergence.measure import TokenDivergence
from lmeval_ext.divergence.measured_model import MeasuredModel
from lmeval_ext.divergence.plan import ObservationPlan
from lmeval_ext.divergence.store import Manifest, ReferenceStore, StoredWindow
from lmeval_ext.divergence.weights import weights_sha256
from lmeval_ext.errors import UserError
from lmeval_ext.requests import WindowRequest, WindowScores, key_of

logger = logging.getLogger(__name__)

# States that stand in memory until they are written, and so what an interruption can cost
_GROUP_BYTES = 256 << 20
# Nats a token. 16-bit logits are off by 1e-6 to 1e-4; a forgotten scale or softcap by more than this
_NOT_THE_HEAD = 0.01


def score(model: MeasuredModel, windows: Sequence[WindowRequest]) -> list[WindowScores]:
    """Scores of the windows, with `divergence`. UserError where the reference does not fit, before anything is run."""
    by_key = {key_of(w): w for w in windows}
    arguments = model.reference_arguments
    found = _save(model, by_key) if arguments.save_reference else _compare(model, by_key)
    return [found[key_of(w)] for w in windows]


# ---------------------------------------------------------------------- measuring against a store


def _compare(model: MeasuredModel, windows: dict[str, WindowRequest]) -> dict[str, WindowScores]:
    arguments = model.reference_arguments
    store = ReferenceStore.open(str(arguments.reference))
    common = check_fit(model, store, windows)
    requests = list(windows.values())
    keys = tuple(key_of(requests[i]) for i in model.scoring_order(requests))
    plan = ObservationPlan(str(store.folder), False, store.manifest.mode, common, arguments.reference_chunk, keys)
    with ThreadPoolExecutor(1) as beside:  # milliseconds, in which a GPU would have nothing to do
        weights = beside.submit(weights_sha256, model.checkpoint())
        rounding = beside.submit(lambda: {key: _rounding(store.own_kld(key)) for key in windows})
        try:
            model.observe_windows(plan)
            scores = model.score_timed(requests)
        finally:
            model.stop_observing()
    about = DivergenceSource(store.manifest, "comparison", common, weights.result())
    own = rounding.result()
    return {key: about.added(found, own[key]) for key, found in zip(windows, scores, strict=True)}


# ---------------------------------------------------------------------- writing a store


def _save(model: MeasuredModel, windows: dict[str, WindowRequest]) -> dict[str, WindowScores]:
    arguments = model.reference_arguments
    folder, mode = Path(str(arguments.save_reference)), _mode(model)
    plan = ObservationPlan(str(folder), True, mode, model.vocabulary, arguments.reference_chunk)
    try:
        facts = model.observe_windows(plan)
        store = ReferenceStore.create(folder, _manifest(model, mode, facts))
        if mode == "hidden" and not store.has_sound_head():
            model.write_head(store)
        found = _kept(store, windows)
        todo = [key for key in windows if key not in found]
        if found:
            logger.warning("save_reference=%s: %d of %d windows are there already", folder, len(found), len(windows))
        with tqdm(
            total=len(windows), initial=len(found), desc=f"Scoring windows ({model.label})", unit="window"
        ) as bar:
            model.bar = bar
            for keys in _groups(todo, windows, model, store.manifest):
                scores = dict(zip(keys, model.score_timed([windows[key] for key in keys]), strict=True))
                _check_distributions(scores, model, mode)
                for key, (states, own) in _stored(model, scores).items():
                    store.write(StoredWindow(key, states, own))
                    found[key] = scores[key]
    finally:
        model.bar = None
        model.stop_observing()
    _say_size(store, windows)
    about = DivergenceSource(store.manifest, "reference", model.vocabulary, store.manifest.model["weights_sha256"])
    return {key: about.added(s, _rounding((s.divergence or {})["kld"])) for key, s in found.items()}


def _manifest(model: MeasuredModel, mode: str, head: dict[str, Any]) -> Manifest:
    """What decides over the distributions: weights, config, arguments, and what they run on."""
    about, path = model.describe(), model.checkpoint()
    config = None if path is None else Path(path) / "config.json"
    return Manifest(
        model={
            "label": about.label,
            "engine": about.engine,
            "engine_version": about.engine_version,
            "dtype": about.dtype,
            "device": about.device,
            "kernel": about.kernel,
            "weights_sha256": weights_sha256(path),
            "config_sha256": hashlib.sha256(config.read_bytes()).hexdigest() if config and config.is_file() else None,
            "arguments": model.reference_arguments.others,
        },
        mode=mode,
        vocabulary=model.vocabulary,
        tokenizer_probe=probe(model),
        **head,
    )


def _groups(
    todo: list[str], windows: dict[str, WindowRequest], model: MeasuredModel, manifest: Manifest
) -> Iterator[list[str]]:
    """Windows that are scored and written together: one after the other, or as many as a GPU likes and memory holds."""
    width = 2 * manifest.vocabulary + 8 * EXACT if manifest.mode == "logits" else 4 * int(manifest.width or 1)
    longest = max((len(windows[key].target_ids) for key in todo), default=1)
    count = max(1, min(model.windows_at_once, _GROUP_BYTES // (width * longest)))
    for start in range(0, len(todo), count):
        yield todo[start : start + count]


def _mode(model: MeasuredModel) -> str:
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
        measured = {name: own[name] for name in TokenDivergence._fields}
        found[key] = WindowScores.of(own["logprobs"], own["greedy"], measured)
    return found


def _stored(
    model: MeasuredModel, scores: dict[str, WindowScores]
) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """States and scores of each window, as a store keeps them."""
    states = model.take_states({key: len(s.logprobs) for key, s in scores.items()})
    result = {}
    for key, found in scores.items():
        said = found.divergence or {}
        own = {
            "logprobs": torch.tensor(found.logprobs, dtype=torch.float32),
            "greedy": torch.tensor(found.greedy, dtype=torch.bool),
            **{name: torch.from_numpy(np.array(said[name])) for name in TokenDivergence._fields},
        }
        result[key] = (states[key], own)
    return result


def _check_distributions(scores: dict[str, WindowScores], model: MeasuredModel, mode: str) -> None:
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
    files = [*map(store.path, windows), *([store.head_path] if store.manifest.mode == "hidden" else [])]
    size = sum(path.stat().st_size for path in files)
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


def _rounding(kld: npt.ArrayLike) -> dict[str, float]:
    """Divergence of the reference's own engine from what is stored, over one window."""
    wide = np.asarray(kld, np.float64)
    return {"kld_sum": float(wide.sum()), "kld_max": float(wide.max())}


@dataclass(frozen=True)
class DivergenceSource:
    """What a divergence is from, and of which weights."""

    manifest: Manifest
    role: str
    vocabulary: int
    weights: str | None

    def added(self, scores: WindowScores, rounding: dict[str, float]) -> WindowScores:
        m = self.manifest.model
        names = ("label", "engine", "engine_version", "dtype", "weights_sha256")
        about = {
            "id": self.manifest.id,
            **{name: m.get(name) for name in names},
            "mode": self.manifest.mode,
            "role": self.role,
            "vocabulary": self.vocabulary,
            "rounding": rounding,
            "model_weights_sha256": self.weights,
        }
        return scores._replace(divergence={**(scores.divergence or {}), "reference": about})
