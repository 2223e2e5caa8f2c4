"""Which quantization should I run? The answer in sentences, each with the figures that it follows from.

Only comparable results take part: the same tokens, and for a divergence the same reference. What was not measured, or
is not known, is a sentence of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from compare.comparison.best import frontier
from compare.comparison.comparison import Comparison
from compare.comparison.equivalence import POWER
from compare.comparison.loss import LossScale, loss_of, loss_scale
from compare.comparison.memory import GIB, loaded_bytes, longest_context, memory
from compare.comparison.pairs import measure_pairs
from compare.comparison.point import Point
from compare.comparison.significance import CONFIDENCE, PairedDifference
from compare.text import and_more

_MOST = 1000  # times as many tokens: beyond that, a number of tokens helps nobody


@dataclass(frozen=True)
class Sentence:
    """kind: which question it answers. text: the sentence. labels: the models that it names first.

    figures: the numbers that it follows from, as in `compare choose --format json`.
    """

    kind: str
    text: str
    labels: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """A comparable model. loss: in the scale's unit, None without an original. size: bytes, None if unknown."""

    point: Point
    loss: float | None
    error: float | None
    size: int | None

    @property
    def label(self) -> str:
        return self.point.record.label

    def figures(self) -> dict[str, Any]:
        """The model's numbers for JSON; `bytes` as in `Answer.size_of`."""
        return {"value": self.point.y, "loss": self.loss, "loss_stderr": self.error, "bytes": self.size}


Differences = list[tuple[Candidate, PairedDifference]]
Reasons = list[tuple[Candidate, str]]


class Answer:
    """The answer for one comparison. max_loss: the largest acceptable loss, in the unit of `scale`.

    Raises CompareError where the metric has no direction.
    """

    def __init__(self, comparison: Comparison, max_loss: float | None = None) -> None:
        self.comparison = comparison
        self.max_loss = max_loss
        self.scale: LossScale = loss_scale(comparison.metric)

    @cached_property
    def candidates(self) -> list[Candidate]:
        """The comparable models with a figure, smallest first; a model with a figure that is NaN is not one."""
        points = [p for p in self.comparison.points if p.comparable and p.y is not None and not p.record.not_numbers]
        found = [Candidate(p, *loss_of(p, self.comparison, self.scale), self.size_of(p)) for p in points]
        return sorted(found, key=lambda c: (c.size is None, c.size or 0, c.label))

    @cached_property
    def _cache_is_exact(self) -> bool:
        """Whether the cache of every model is known, so that it can be added to the weights."""
        context = self.comparison.options.context
        if context is None:
            return False
        points = [p for p in self.comparison.points if p.comparable and loaded_bytes(p.record.quantization) is not None]
        needs = [memory(p.record.quantization, context) for p in points]
        return all(need is not None and need.exact for need in needs)

    def size_of(self, point: Point) -> int | None:
        """Bytes of all weights that an engine loads, plus the cache of --context where that is known of all models."""
        q, context = point.record.quantization, self.comparison.options.context
        if context is None or not self._cache_is_exact:
            return loaded_bytes(q)
        needed = memory(q, context)
        return None if needed is None else needed.total

    @property
    def size_name(self) -> str:
        """What `size_of` counts: ``weights``, ``weights + cache of 8,192 tokens``."""
        return f"weights + cache of {self.comparison.options.context:,} tokens" if self._cache_is_exact else "weights"

    def sentences(self) -> list[Sentence]:
        """The whole answer, in the order in which a reader needs it."""
        found = [
            self._measured(),
            self._within_noise(),
            self._smallest(),
            self._best_in_budget(),
            self._sizes(),
            *self._not_told_apart(),
            *self._unknown(),
        ]
        return [sentence for sentence in found if sentence is not None]

    def _measured(self) -> Sentence:
        metric, models = self.comparison.metric, self.candidates
        count = f"{len(models)} model{'' if len(models) == 1 else 's'}"
        over = self.comparison.points[0].record if not models else models[0].point.record
        scored = over.protocol.scored_tokens
        tokens = f"; {scored:,} tokens scored" if scored else ""
        original = self.comparison.baseline
        against = "" if original is None else f"; losses are against {original.record.label}"
        text = f"{count} by {metric.name} of {metric.task}: {over.scored_on(metric.metric)}{tokens}{against}."
        return Sentence("measured", text, tuple(c.label for c in models), {
            "metric": metric.label, "unit": self.scale.unit.strip(), "scored_tokens": scored, "models": len(models),
            "original": original.record.label if against and original is not None else None,
        })  # fmt: skip

    def _within_noise(self) -> Sentence | None:
        floor, metric = self.comparison.noise_floor, self.comparison.metric
        if floor is None:
            if not metric.row.needs_reference:
                return self._not_told_from_original()
            return Sentence("within_noise", "The noise floor is unknown: no result of the original is among the files.")
        inside = {id(p) for p in self.comparison.in_noise}
        found = [c for c in self.candidates if id(c.point) in inside]
        figures = {"low": floor.low, "high": floor.high, "sources": list(floor.sources)}
        if not found:
            text = f"No quantized model is within the noise of the original, {floor}."
            return Sentence("within_noise", text, (), figures)
        names = and_more([f"{c.label}, {self._value(c)}" for c in found])
        text = f"Within the noise of the original, {floor}: {names}."
        return Sentence("within_noise", text, tuple(c.label for c in found), figures)

    def _not_told_from_original(self) -> Sentence | None:
        """For a metric without a reference: the models whose figure the data cannot separate from the original's."""
        original = self.comparison.baseline
        if original is None:
            return None
        rest = [c for c in self.candidates if c.point is not original and c.point.size == original.size]
        same, _, without = self._against(original, rest)
        if same:
            text = f"Not told apart from the original, {original.record.label}: {and_more([c.label for c, _ in same])}."
        elif without and len(without) == len(rest):
            text = f"Whether a loss is more than chance is unknown: {without[0][1]}."
        else:
            text = f"Every other model differs from the original, {original.record.label}, by more than chance."
        return Sentence("within_noise", text, tuple(c.label for c, _ in same))

    def _smallest(self) -> Sentence | None:
        if self.max_loss is None:
            return None
        limit = self.scale.text(self.max_loss)
        figures = {"max_loss": self.max_loss}
        known = [c for c in self.candidates if c.loss is not None]
        if not known:
            text = f"Which model loses at most {limit} is unknown: no result of the original is among the files."
            return Sentence("smallest", text, (), figures)
        within = [c for c in known if c.loss is not None and c.loss <= self.max_loss]
        sized = [c for c in within if c.size is not None]
        if not within:
            least = min(known, key=lambda c: c.loss or 0.0)
            text = f"No model loses at most {limit}; the least is lost by {self._named(least)}."
            return Sentence("smallest", text, (), figures | {"least": least.label, **least.figures()})
        if not sized:
            text = f"At most {limit} is lost by {and_more([c.label for c in within])}, of unknown size."
            return Sentence("smallest", text, tuple(c.label for c in within), figures)
        best = sized[0]
        reach = "" if best.error is None or best.loss is None else self._reach(best.loss, best.error, self.max_loss)
        text = f"Smallest that loses at most {limit}: {self._named(best)}{reach}."
        return Sentence("smallest", text, (best.label,), figures | best.figures())

    def _reach(self, loss: float, error: float, limit: float) -> str:
        from scipy import stats

        high = loss + float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * error
        return "; on other text of this kind it may lose more than that" if high > limit else ""

    def _best_in_budget(self) -> Sentence | None:
        verdict = self.comparison.verdict
        if verdict is None:
            return None
        headline, *rest = verdict.lines(self.comparison.metric)
        best = next((c for c in self.candidates if c.point is verdict.best), None)
        figures: dict[str, Any] = {
            "gib": verdict.budget.gib, "context": verdict.budget.context,
            "fitting": [p.record.label for p in verdict.fitting],
            "too_large": [p.record.label for p in verdict.too_large],
            "unknown": [p.record.label for p in verdict.unknown],
        }  # fmt: skip
        if best is not None:
            headline = f"best within {verdict.budget}: {best.label}, {self._value(best)}; it needs {verdict.need()}"
            room = longest_context(best.point.record.quantization, verdict.budget.gib)
            if room is not None:
                holds = "its cache at any context" if room.tokens is None else f"{room} tokens of its cache"
                rest.insert(0, f"the memory holds {holds}")
                figures["longest_context"] = room.tokens
            rest.append("activations and the engine's buffers come on top")
            figures |= best.figures()
        lines = [f"{line[:1].upper()}{line[1:]}." for line in (headline, *rest)]
        return Sentence("best_in_budget", " ".join(lines), (best.label,) if best is not None else (), figures)

    def _sizes(self) -> Sentence | None:
        """The Pareto frontier over size, from large to small."""
        sized = [c for c in self.candidates if c.size is not None]
        placed = [replace(c.point, x=float(c.size or 0)) for c in sized]
        candidate_of = {id(point): c for point, c in zip(placed, sized, strict=True)}
        kept = [candidate_of[id(p)] for p in frontier(placed, bool(self.comparison.metric.higher_is_better))]
        if len(kept) < 2:
            return None
        kept.reverse()
        text = f"Worth a look, from large to small ({self.size_name}): {'; '.join(map(self._named, kept))}."
        return Sentence("sizes", text, tuple(c.label for c in kept), {"models": [c.figures() for c in kept]})

    def _not_told_apart(self) -> list[Sentence]:
        """For each model named as the best: the rivals that the data cannot separate from it."""
        verdict = self.comparison.verdict
        if verdict is None or verdict.best is None:
            return []
        winner, fitting = verdict.best, {id(p) for p in verdict.fitting}
        rivals = [c for c in self.candidates if id(c.point) in fitting and c.point is not winner]
        if not rivals:
            return []
        label = winner.record.label
        same, differing, without = self._against(winner, rivals)
        found = []
        if same:
            named = and_more([f"{c.label}{self._needed(winner, difference)}" for c, difference in same])
            text = f"Not told apart from {label} by this many tokens or questions: {named}."
            found.append(Sentence("not_told_apart", text, tuple(c.label for c, _ in same), {"from": label}))
        elif differing:
            names = and_more([c.label for c, _ in differing])
            text = f"The difference between {label} and the other models that fit is more than chance: {names}."
            found.append(Sentence("told_apart", text, tuple(c.label for c, _ in differing), {"from": label}))
        if without:
            names, reason = and_more([c.label for c, _ in without]), without[0][1]
            text = f"Whether {label} differs from {names} by more than chance is unknown: {reason}."
            found.append(Sentence("unknown_difference", text, tuple(c.label for c, _ in without), {"from": label}))
        return found

    def _against(self, winner: Point, rivals: Sequence[Candidate]) -> tuple[Differences, Differences, Reasons]:
        """Rivals that are not told apart from `winner`, those that are, and those without a pair, with the reason."""
        same: Differences = []
        differing: Differences = []
        without: Reasons = []
        if self.comparison.metric.averaged:
            return same, differing, [(c, "a mean of tasks has no pairs") for c in rivals]
        pairs = measure_pairs([winner, *(c.point for c in rivals)], self.comparison.metric, winner.record.label)
        for c in rivals:
            pair = pairs.pair(c.point)
            if pair.difference is None or pair.separated is None:
                without.append((c, pair.reason or "there are too few blocks of windows, or questions"))
            elif pair.separated:
                differing.append((c, pair.difference))
            else:
                same.append((c, pair.difference))
        return same, differing, without

    def _needed(self, winner: Point, difference: PairedDifference) -> str:
        """`` (p = 0.31; about 120,000 tokens would tell)``: by `times_as_many`."""
        times, p = times_as_many(difference), f"p = {difference.p:.2g}"
        if times is None or times > _MOST:
            return f" ({p})"
        tokens = winner.record.protocol.scored_tokens
        unit, now = ("tokens", tokens) if tokens else ("questions", difference.units)
        return f" ({p}; about {_two_digits(times * now):,} {unit} would tell)"

    def _unknown(self) -> list[Sentence]:
        """What was not measured, so that nobody takes its absence for a result."""
        found = []
        unsized = [c.label for c in self.candidates if c.size is None]
        if unsized:
            text = f"The size of {and_more(unsized)} is unknown, so it is not among the sizes."
            found.append(Sentence("unknown_size", text, tuple(unsized)))
        unmeasured = [p.record.label for p in self.comparison.points if p.comparable and p.y is None]
        if unmeasured:
            text = f"Without a figure: {and_more(unmeasured)}."
            found.append(Sentence("unmeasured", text, tuple(unmeasured)))
        apart = [p.record.label for p in self.comparison.points if not p.comparable]
        if apart:
            text = f"Not comparable with these, and left out: {and_more(apart)}."
            found.append(Sentence("kept_apart", text, tuple(apart)))
        broken = [p.record.label for p in self.comparison.points if p.comparable and p.record.not_numbers]
        if broken:
            text = f"Left out, since a figure of theirs is NaN or infinite: {and_more(broken)}."
            found.append(Sentence("broken", text, tuple(broken)))
        found.append(Sentence("speed", "Speed was not measured: nothing here says which of them is faster."))
        return found

    def _named(self, c: Candidate) -> str:
        """``Q4_K_M, 4.58 GB, loses 0.041 nats``."""
        size = "" if c.size is None else f", {c.size / GIB:.2f} GB"
        return f"{c.label}{size}, {self._value(c)}"

    def _value(self, c: Candidate) -> str:
        """``loses 0.041 nats``; the figure itself where no loss is known."""
        if c.loss is None:
            return f"{self.comparison.metric.short} {c.point.y:.5g}"
        return f"loses {self.scale.text(c.loss, c.error)}"


def times_as_many(difference: PairedDifference) -> float | None:
    """How many times as many tokens or questions would show `difference` at 5 % with a power of `POWER`.

    ((z₀.₉₇₅ + z_power) · s / d)², s the standard error behind the 95 % interval (sample size of a paired difference:
    Chow, Shao and Wang 2008, Sample Size Calculations in Clinical Research, §3.1); None where d is 0 or has no error.
    """
    from scipy import stats

    if difference.low is None or difference.high is None or not difference.value:
        return None
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    error = (difference.high - difference.low) / 2 / z
    return ((z + float(stats.norm.ppf(POWER))) * error / difference.value) ** 2


def _two_digits(value: float) -> int:
    return int(float(f"{value:.2g}"))
