"""Scores windows with `save_reference=` or `reference=`: checks that they fit, observes, and adds `divergence`."""

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

# Bytes of states that are in memory until they are written: the most that an interruption can lose
_GROUP_BYTES = 256 << 20
# Largest mean divergence of an engine's logits from hidden states × head, in nats per token, by the engine's dtype.
# Right heads show below 1e-8 in float32, where a cap of 30 that is missing shows from 4e-4 on. In 16 bits it is the
# rounding of the logits: x of relative standard deviation r gives r² x² / 2, which for |x| = 30 and two roundings is
# 5e-3 with bfloat16 (r = 2⁻⁷/√12), and 64 times less with float16.
_WRONG_HEAD = {"float64": 1e-6, "float32": 1e-6, "float16": 2e-4, "bfloat16": 0.01}


def score(model: MeasuredModel, windows: Sequence[WindowRequest]) -> list[WindowScores]:
    """Scores of the windows, with `divergence`. Raises UserError before scoring if the reference does not fit."""
    windows_by_key = {key_of(w): w for w in windows}
    run = _save if model.reference_arguments.save_reference else _compare
    scores = run(model, windows_by_key)
    return [scores[key_of(w)] for w in windows]


@dataclass(frozen=True)
class DivergenceSource:
    """Identity of the reference and of the measured weights.

    role: of the run, "reference" (it wrote the reference) or "comparison". vocabulary: columns of the softmax.
    weights: `weights_sha256` of the measured model.
    """

    manifest: Manifest
    role: str
    vocabulary: int
    weights: str | None

    def added(self, scores: WindowScores, rounding: dict[str, float]) -> WindowScores:
        """Scores with this identity under `divergence["reference"]`. rounding: of this window (`_rounding`)."""
        model = self.manifest.model
        names = ("label", "engine", "engine_version", "dtype", "weights_sha256")
        identity = {
            "id": self.manifest.id,
            **{name: model.get(name) for name in names},
            "mode": self.manifest.mode,
            "role": self.role,
            "vocabulary": self.vocabulary,
            "rounding": rounding,
            "model_weights_sha256": self.weights,
        }
        return scores._replace(divergence={**(scores.divergence or {}), "reference": identity})


# ---------------------------------------------------------------------- measuring against a store


def _compare(model: MeasuredModel, windows: dict[str, WindowRequest]) -> dict[str, WindowScores]:
    """Scores by key, measured against the store of `reference=`."""
    arguments = model.reference_arguments
    store = ReferenceStore.open(str(arguments.reference))
    common = check_fit(model, store, windows)
    requests = list(windows.values())
    keys = tuple(key_of(requests[i]) for i in model.scoring_order(requests))
    plan = ObservationPlan(str(store.folder), False, store.manifest.mode, common, arguments.reference_chunk, keys)
    with ThreadPoolExecutor(1) as pool:  # reads files while the engine works; a GPU would wait for milliseconds
        weights = pool.submit(weights_sha256, model.checkpoint())
        roundings = pool.submit(lambda: {key: _rounding(store.own_kld(key)) for key in windows})
        try:
            model.observe_windows(plan)
            scores = model.score_timed(requests)
        finally:
            model.stop_observing()
    source = DivergenceSource(store.manifest, "comparison", common, weights.result())
    rounding = roundings.result()
    return {key: source.added(s, rounding[key]) for key, s in zip(windows, scores, strict=True)}


# ---------------------------------------------------------------------- writing a store


def _save(model: MeasuredModel, windows: dict[str, WindowRequest]) -> dict[str, WindowScores]:
    """Scores by key; writes the windows that the store of `save_reference=` does not have."""
    arguments = model.reference_arguments
    folder, mode = Path(str(arguments.save_reference)), _mode_to_save(model)
    plan = ObservationPlan(str(folder), True, mode, model.vocabulary, arguments.reference_chunk)
    try:
        head = model.observe_windows(plan)
        store = ReferenceStore.create(folder, _manifest(model, mode, head))
        if mode == "hidden" and not store.has_sound_head():
            model.write_head(store)
        scores = _scores_in_store(store, windows)
        missing = [key for key in windows if key not in scores]
        if scores:
            logger.warning("save_reference=%s: %d of %d windows are there already", folder, len(scores), len(windows))
        with tqdm(
            total=len(windows), initial=len(scores), desc=f"Scoring windows ({model.label})", unit="window"
        ) as bar:
            model.bar = bar
            for keys in _groups_to_score(missing, windows, model, store.manifest):
                group = dict(zip(keys, model.score_timed([windows[key] for key in keys]), strict=True))
                _check_distributions(group, model, mode)
                for window in _stored_windows(model, group):
                    store.write(window)
                    scores[window.key] = group[window.key]
    finally:
        model.bar = None
        model.stop_observing()
    _log_size(store, windows)
    source = DivergenceSource(store.manifest, "reference", model.vocabulary, store.manifest.model["weights_sha256"])
    return {key: source.added(s, _rounding((s.divergence or {})["kld"])) for key, s in scores.items()}


def _mode_to_save(model: MeasuredModel) -> str:
    """reference_mode=, by default the engine's best. Raises UserError if the engine does not have it."""
    mode = model.reference_arguments.reference_mode
    if mode is not None and mode not in model.reference_modes:
        raise UserError(
            f"reference_mode={mode}: this engine gives no hidden states; leave it out to store coded logits"
        )
    return mode or model.reference_modes[0]


def _manifest(model: MeasuredModel, mode: str, head: dict[str, Any]) -> Manifest:
    """What determines the distributions: weights, config, arguments, engine and device. head: `head_facts`."""
    facts, path = model.describe(), model.checkpoint()
    config = None if path is None else Path(path) / "config.json"
    return Manifest(
        model={
            "label": facts.label,
            "engine": facts.engine,
            "engine_version": facts.engine_version,
            "dtype": facts.dtype,
            "device": facts.device,
            "kernel": facts.kernel,
            "weights_sha256": weights_sha256(path),
            "config_sha256": hashlib.sha256(config.read_bytes()).hexdigest() if config and config.is_file() else None,
            "arguments": model.reference_arguments.others,
        },
        mode=mode,
        vocabulary=model.vocabulary,
        tokenizer_probe=probe(model),
        **head,
    )


def _scores_in_store(store: ReferenceStore, windows: dict[str, WindowRequest]) -> dict[str, WindowScores]:
    """Scores of the windows that the store has; a damaged one counts as missing, and is written again."""
    scores = {}
    for key in windows:
        if key not in store:
            continue
        try:
            window = store.read(key)
        except UserError as error:
            logger.warning("written again: %s", error)
            continue
        arrays = {name: t.numpy() for name, t in window.scores.items()}
        divergence = {name: arrays[name] for name in TokenDivergence._fields}
        scores[key] = WindowScores.of(arrays["logprobs"], arrays["greedy"], divergence)
    return scores


def _groups_to_score(
    keys: list[str], windows: dict[str, WindowRequest], model: MeasuredModel, manifest: Manifest
) -> Iterator[list[str]]:
    """Keys of windows that are scored and written together: as many as the engine takes and `_GROUP_BYTES` hold."""
    width = 2 * manifest.vocabulary + 8 * EXACT if manifest.mode == "logits" else 4 * int(manifest.width or 1)
    longest = max((len(windows[key].target_ids) for key in keys), default=1)
    count = max(1, min(model.windows_at_once, _GROUP_BYTES // (width * longest)))
    for start in range(0, len(keys), count):
        yield keys[start : start + count]


def _check_distributions(scores: dict[str, WindowScores], model: MeasuredModel, mode: str) -> None:
    """Raises UserError unless all distributions are finite and the head gives the model's own logits up to rounding."""
    kld = np.concatenate([np.asarray((s.divergence or {})["kld"], np.float64) for s in scores.values()])
    if not np.isfinite(kld).all():
        raise UserError(
            f"{model.label}: {int((~np.isfinite(kld)).sum())} of {len(kld)} distributions are not finite, so it cannot "
            "be a reference; check for damaged weights, or for a dtype that overflows"
        )
    dtype = str(model.describe().dtype)
    largest = _WRONG_HEAD.get(dtype, min(_WRONG_HEAD.values()))
    if mode == "hidden" and kld.mean() > largest:
        raise UserError(
            f"{model.label}: hidden states times output matrix do not give this model's logits (mean divergence "
            f"{kld.mean():.3g}, in {dtype} expected below {largest:g}): its head does something that is not known "
            "here; use reference_mode=logits"
        )


def _stored_windows(model: MeasuredModel, scores: dict[str, WindowScores]) -> Iterator[StoredWindow]:
    """Each scored window as a store keeps it."""
    states = model.take_states({key: len(s.logprobs) for key, s in scores.items()})
    for key, s in scores.items():
        divergence = s.divergence or {}
        tensors = {
            "logprobs": torch.tensor(s.logprobs, dtype=torch.float32),
            "greedy": torch.tensor(s.greedy, dtype=torch.bool),
            **{name: torch.from_numpy(np.array(divergence[name])) for name in TokenDivergence._fields},
        }
        yield StoredWindow(key, states[key], tensors)


def _log_size(store: ReferenceStore, windows: dict[str, WindowRequest]) -> None:
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


def _rounding(kld: npt.ArrayLike) -> dict[str, float]:
    """Sum and maximum over one window of the divergence of the reference's engine from the stored distributions."""
    wide = np.asarray(kld, np.float64)
    return {"kld_sum": float(wide.sum()), "kld_max": float(wide.max())}
