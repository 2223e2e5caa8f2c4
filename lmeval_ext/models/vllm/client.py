"""Requests scores of prompt tokens from vLLM: from its workers, or through `prompt_logprobs`.

`EngineScoring` is the fast way: the worker extension (worker.py) computes scores next to the weights, and only scores
are sent back. `prompt_logprobs` is vLLM's own way, for engines that the extension cannot reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import vllm

from lmeval_ext.errors import UserError
from lmeval_ext.models.vllm.long_rope import LongRope
from lmeval_ext.models.vllm.scoring import EXTRA_ARG

WORKER_EXTENSION = "lmeval_ext.models.vllm.worker.WorkerExtension"


class TokenScores(NamedTuple):
    """Scores of one prompt. logprobs: float32 and greedy: bool, both [scored tokens].

    divergence: the fields of `TokenDivergence`, if the prompt was observed.
    """

    logprobs: np.ndarray
    greedy: np.ndarray
    divergence: dict[str, np.ndarray] | None = None


class ScoringPrompt(NamedTuple):
    """Token ids, to be scored from position `first` on. window: the window's key, if it is observed."""

    ids: list[int]
    first: int
    window: str | None = None


class UnknownRunnerError(Exception):
    """The worker extension does not know the model runner of this vLLM."""


class EngineScoring:
    """Scores from the workers of one engine. Raises UnknownRunnerError if they cannot compute them.

    rope: the model's LongRoPE, None for other models.
    """

    def __init__(self, llm: Any, rope: LongRope | None = None) -> None:
        self._llm, self._rope = llm, rope
        self._long: bool | None = None  # the factors that the workers take; None: vLLM's own choice
        self._next = 0  # request numbers are unique, so that scores of an interrupted call match no later call
        reasons = [reason for reason in llm.collective_rpc("lmeval_ext_install") if reason]
        if reasons:
            raise UnknownRunnerError(reasons[0])
        if rope is not None and any(found != [rope.context] for found in llm.collective_rpc("lmeval_ext_long_rope")):
            raise UnknownRunnerError("its rotary embedding with LongRoPE is another one")

    def use_factors(self, long: bool | None) -> None:
        """Takes long or short factors of LongRoPE from now on; None: vLLM's own choice, for generated text."""
        if self._rope is None or not self._rope.switchable or long == self._long:
            return
        self._llm.collective_rpc("lmeval_ext_switch_long_rope", args=(long,))
        self._llm.reset_prefix_cache()  # cached keys are rotated
        self._long = long

    def score(self, prompts: Sequence[ScoringPrompt], reuse_prefixes: bool, use_tqdm: bool) -> list[TokenScores]:
        """Scores of each prompt, in order.

        reuse_prefixes: let vLLM's prefix cache provide what prompts share. If it provides a position whose state is
        needed, that prompt is computed again without it. Raises UserError if the observer failed on a read.
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
        rope = self._rope
        groups: dict[bool | None, list[int]] = {None: todo}
        if rope is not None:
            rope.check([len(prompts[i].ids) for i in todo])
            groups = {long: [i for i in todo if rope.wants_long(len(prompts[i].ids)) is long] for long in (False, True)}
        for long, group in groups.items():
            if group:
                self.use_factors(long)
                self._run_group(prompts, group, scores, reuse_prefixes, use_tqdm)

    def _run_group(
        self,
        prompts: Sequence[ScoringPrompt],
        todo: list[int],
        scores: list[TokenScores | None],
        reuse_prefixes: bool,
        use_tqdm: bool,
    ) -> None:
        base, self._next = self._next, self._next + len(todo)
        params = [
            _one_token(
                skip_reading_prefix_cache=not reuse_prefixes, extra_args={EXTRA_ARG: _score_argument(n, prompts[i])}
            )
            for n, i in enumerate(todo, base)
        ]
        tokens = [vllm.TokensPrompt(prompt_token_ids=prompts[i].ids) for i in todo]
        self._llm.generate(tokens, sampling_params=params, use_tqdm=use_tqdm)
        taken = next((t for t in self._llm.collective_rpc("lmeval_ext_take") if t), None)
        if taken is not None and "refused" in taken:
            raise UserError(taken["refused"])
        by_number = {n: prompts[i] for n, i in enumerate(todo, base)}
        for n, score in assemble(taken, by_number).items():
            scores[todo[n - base]] = score


def _score_argument(number: int, prompt: ScoringPrompt) -> list[Any]:
    return [number, prompt.first] if prompt.window is None else [number, prompt.first, prompt.window]


def assemble(taken: dict[str, Any] | None, prompts: dict[int, ScoringPrompt]) -> dict[int, TokenScores]:
    """Scores of the complete prompts, by request number, from what `PromptScorer.take` gives.

    A position that was scored twice (preemption) keeps its last score.
    """
    if taken is None:
        return {}
    flat = {
        name: np.frombuffer(data, dtype=bool if name in ("greedy", "agree") else np.float32)
        for name, data in taken.items()
        if name != "spans"
    }
    if any(len(column) != sum(count for *_, count in taken["spans"]) for column in flat.values()):
        raise RuntimeError("vLLM's workers returned columns of another length than their spans")
    size = {n: len(p.ids) - p.first for n, p in prompts.items()}
    columns = {n: {name: np.empty(k, column.dtype) for name, column in flat.items()} for n, k in size.items()}
    scored = {n: np.zeros(k, bool) for n, k in size.items()}
    row = 0
    for n, start, count in taken["spans"]:
        if n in prompts:
            to, source = start - prompts[n].first, slice(row, row + count)
            for name, column in flat.items():
                columns[n][name][to : to + count] = column[source]
            scored[n][to : to + count] = True
        row += count
    return {
        n: TokenScores(values.pop("logprobs"), values.pop("greedy"), values or None)
        for n, values in columns.items()
        if scored[n].all()
    }


def prompt_logprobs_params() -> Any:
    """Parameters for vLLM's own way: 0 is for the prompt's own tokens and ranks, without top-k; flat saves objects."""
    return _one_token(prompt_logprobs=0, flat_logprobs=True)


def read_prompt_logprobs(prompt: ScoringPrompt, flat: Any) -> TokenScores:
    """Scores from vLLM's FlatLogprobs, which has one entry for each prompt token but the first."""
    targets = prompt.ids[prompt.first :]
    n = len(targets)
    if list(flat.token_ids[-n:]) != targets or len(flat.token_ids) != len(prompt.ids) - 1:
        raise RuntimeError("vLLM returned log-probabilities of tokens that are not the prompt's")
    return TokenScores(np.array(flat.logprobs[-n:], np.float32), np.array([rank == 1 for rank in flat.ranks[-n:]]))


def _one_token(**arguments: Any) -> Any:
    # vLLM generates at least one token
    return vllm.SamplingParams(temperature=0, max_tokens=1, detokenize=False, ignore_eos=True, **arguments)
