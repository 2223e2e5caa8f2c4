"""Asking vLLM for the scores of prompt tokens: from its workers, or through `prompt_logprobs`.

`EngineScoring` is the fast way: the worker extension (`vllm_worker.py`) computes them next to the weights and only they
come back. `prompt_logprobs` is vLLM's own way, for engines that the extension cannot reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import vllm

from lmeval_ext.errors import UserError
from lmeval_ext.models.vllm.scoring import EXTRA_ARG

WORKER_EXTENSION = "lmeval_ext.models.vllm.worker.WorkerExtension"


class TokenScores(NamedTuple):
    """logprobs: float32, greedy: bool, both [scored tokens] of one prompt; divergence: the fields of `TokenDivergence`,
    where an observer looked at it."""

    logprobs: np.ndarray
    greedy: np.ndarray
    divergence: dict[str, np.ndarray] | None = None


class ScoringPrompt(NamedTuple):
    """Token ids, of which those from position `first` on are to be scored. window: its key, where it is observed."""

    ids: list[int]
    first: int
    window: str | None = None


class UnknownRunnerError(Exception):
    """This vLLM's model runner is not one of those that the worker extension knows."""


class EngineScoring:
    """Scores from the workers of one engine. Raises UnknownRunnerError where they cannot give them."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._next = 0  # numbers of requests are never used twice: scores of an interrupted call fit no later one
        reasons = [reason for reason in llm.collective_rpc("lmeval_ext_install") if reason]
        if reasons:
            raise UnknownRunnerError(reasons[0])

    def score(self, prompts: Sequence[ScoringPrompt], reuse_prefixes: bool, use_tqdm: bool) -> list[TokenScores]:
        """Scores of each prompt, in order.

        reuse_prefixes: let vLLM's prefix cache serve what prompts share. Where it serves a position whose state was
        wanted, that prompt is computed again without it. UserError where an observer refused to look on.
        """
        scores: list[TokenScores | None] = [None] * len(prompts)
        self._run(prompts, scores, reuse_prefixes, use_tqdm)
        if reuse_prefixes:
            self._run(prompts, scores, False, use_tqdm)
        missing = sum(s is None for s in scores)
        if missing:
            raise RuntimeError(f"vLLM's workers returned no scores for {missing} of {len(prompts)} prompts")
        return [s for s in scores if s is not None]

    def _run(
        self, prompts: Sequence[ScoringPrompt], scores: list[TokenScores | None], reuse_prefixes: bool, use_tqdm: bool
    ) -> None:
        todo = [i for i, s in enumerate(scores) if s is None]
        if not todo:
            return
        base, self._next = self._next, self._next + len(todo)
        params = [
            _one_token(skip_reading_prefix_cache=not reuse_prefixes, extra_args={EXTRA_ARG: _wish(n, prompts[i])})
            for n, i in enumerate(todo, base)
        ]
        tokens = [vllm.TokensPrompt(prompt_token_ids=prompts[i].ids) for i in todo]
        self._llm.generate(tokens, sampling_params=params, use_tqdm=use_tqdm)
        taken = next((t for t in self._llm.collective_rpc("lmeval_ext_take") if t), None)
        if taken is not None and "refused" in taken:
            raise UserError(taken["refused"])
        wanted = {n: prompts[i] for n, i in enumerate(todo, base)}
        for n, found in _assemble(taken, wanted).items():
            scores[todo[n - base]] = found


def _wish(number: int, prompt: ScoringPrompt) -> list[Any]:
    return [number, prompt.first] if prompt.window is None else [number, prompt.first, prompt.window]


def _assemble(taken: dict[str, Any] | None, wanted: dict[int, ScoringPrompt]) -> dict[int, TokenScores]:
    """The prompts all of whose scored tokens came; a position that came twice (preemption) keeps its last score."""
    if taken is None:
        return {}
    flat = {
        name: np.frombuffer(data, dtype=bool if name in ("greedy", "agree") else np.float32)
        for name, data in taken.items()
        if name != "spans"
    }
    if any(len(column) != sum(count for *_, count in taken["spans"]) for column in flat.values()):
        raise RuntimeError("vLLM's workers returned other scores than they said")
    size = {n: len(p.ids) - p.first for n, p in wanted.items()}
    columns = {n: {name: np.empty(k, column.dtype) for name, column in flat.items()} for n, k in size.items()}
    came = {n: np.zeros(k, bool) for n, k in size.items()}
    row = 0
    for n, start, count in taken["spans"]:
        if n in wanted:
            to, source = start - wanted[n].first, slice(row, row + count)
            for name, column in flat.items():
                columns[n][name][to : to + count] = column[source]
            came[n][to : to + count] = True
        row += count
    return {
        n: TokenScores(found.pop("logprobs"), found.pop("greedy"), found or None)
        for n, found in columns.items()
        if came[n].all()
    }


def prompt_logprobs_params() -> Any:
    """vLLM's own way: 0 asks for the prompt's own tokens and their ranks, no top-k; flat: no object per token."""
    return _one_token(prompt_logprobs=0, flat_logprobs=True)


def read_prompt_logprobs(prompt: ScoringPrompt, flat: Any) -> TokenScores:
    """Scores from FlatLogprobs: one entry for each prompt token but the first."""
    targets = prompt.ids[prompt.first :]
    n = len(targets)
    if list(flat.token_ids[-n:]) != targets or len(flat.token_ids) != len(prompt.ids) - 1:
        raise RuntimeError("vLLM returned log-probabilities of other tokens than it was given")
    return TokenScores(np.array(flat.logprobs[-n:], np.float32), np.array([rank == 1 for rank in flat.ranks[-n:]]))


def _one_token(**arguments: Any) -> Any:
    # vLLM generates at least one token
    return vllm.SamplingParams(temperature=0, max_tokens=1, detokenize=False, ignore_eos=True, **arguments)
