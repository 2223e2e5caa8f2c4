"""The harness' requests in terms of token windows, for engines that the harness has no class for."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from lmeval_ext.errors import UserError
from lmeval_ext.models.adapter import Adapter
from lmeval_ext.requests import WindowRequest, window_request
from lmeval_ext.tokens import wants_special_tokens

logger = logging.getLogger(__name__)


class TokenLM(Adapter):
    """Tokenizing, log-likelihoods and chat templates, with the meaning they have in the harness' `hf`.

    Beside the four members of `Adapter`, an engine implements `max_length` and sets `tokenizer`. It overrides
    `generate_until` if it generates text, and `score_choices` if it can compute a shared context once.

    tokenizer: a Transformers tokenizer; None if the engine's own vocabulary is used, in which case `encode_text`,
    `tok_decode`, `token_text`, `eot_token_id`, `bos_token_id` and `render_chat` are overridden. add_bos_token,
    custom_prefix_token_id, chat_template_args: as in `hf`; None and {} leave the tokenizer at its own defaults.
    """

    tokenizer: Any = None
    add_bos_token: bool | None = None
    custom_prefix_token_id: int | None = None
    chat_template_args: dict[str, Any] = {}  # noqa: RUF012 (never changed in place)
    texts_at_once: int | None = None  # rolling log-likelihoods: texts whose windows are scored together; None for all

    @property
    @abstractmethod
    def max_length(self) -> int:
        """Size of the model's context in tokens."""

    # ------------------------------------------------------------------ tokens

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def bos_token_id(self) -> int | None:
        token = self.tokenizer.bos_token_id
        return None if token is None else int(token)

    @property
    def prefix_token_id(self) -> int:
        if self.custom_prefix_token_id is not None:
            return int(self.custom_prefix_token_id)
        return self.eot_token_id if self.bos_token_id is None else self.bos_token_id

    def token_text(self, token: int) -> str:
        """Text of one token, special or not."""
        return str(self.tokenizer.decode([token]))

    def encode_text(self, string: str, special: bool | None) -> list[int]:
        """Ids of a text. special: whether special tokens are added; None: the tokenizer's own default."""
        return list(self.tokenizer.encode(string, **({} if special is None else {"add_special_tokens": special})))

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Ids of a text; with left_truncate_len, its last ids alone.

        Special tokens are added by the tokenizer's own default, unless add_bos_token or add_special_tokens override
        it; none are added before a text that begins with the prefix token's text.
        """
        prefix = self.token_text(self.prefix_token_id)
        ids = self.encode_text(string, wants_special_tokens(string, add_special_tokens, self.add_bos_token, prefix))
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    # ------------------------------------------------------------------ log-likelihoods

    def score_choices(self, requests: Sequence[Any]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Scores the harness' own requests; yields (index of the request, (log-likelihood, whether it is greedy)).

        requests: triples as `complete_requests` returns them; of context and continuation together, the last
        max_length + 1 tokens count. Results may come in any order. Here each request is a window of its own; an engine
        that can compute a shared context once overrides this.
        """
        windows = []
        for _, context, continuation in requests:
            ids = (context + continuation)[-(self.max_length + 1) :]  # the last token is only predicted
            windows.append(window_request("", ids, len(ids) - len(continuation), {}, (None, None, None)))
        self.bar = tqdm(disable=True)  # the caller's bar counts requests
        try:
            scores = self.score_windows(windows)
        finally:
            self.bar = None
        yield from enumerate((s.loglikelihood, s.is_greedy) for s in scores)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **kwargs: Any) -> Any:
        if requests and isinstance(requests[0], WindowRequest):
            return super()._loglikelihood_tokens(requests)
        requests = self.complete_requests(requests)
        results: list[tuple[float, bool] | None] = [None] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for index, result in self.score_choices(requests):
                results[index] = result
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], result)
                bar.update()
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text, summed over disjoint windows of max_length tokens."""
        texts = [text for (text,) in (r.args for r in requests)]
        totals: list[float] = []
        at_once = self.texts_at_once or len(texts) or 1
        several = at_once < len(texts)  # then this bar counts texts, and the windows' own bar is off
        for start in tqdm(range(0, len(texts), at_once), disable=disable_tqdm or not several, desc="Texts"):
            group = texts[start : start + at_once]
            windows = [(index, window) for index, text in enumerate(group) for window in self._rolling_windows(text)]
            scored = self._loglikelihood_tokens([(None, *w) for _, w in windows], disable_tqdm=disable_tqdm or several)
            sums = [0.0] * len(group)
            for (index, _), (logprob, _) in zip(windows, scored, strict=True):
                sums[index] += logprob
            for text, total in zip(group, sums, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            totals += sums
        self._count_nan(totals)
        return totals

    def _rolling_windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        """(context ids, continuation ids) of each window of a text."""
        rolling = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return map(make_disjoint_window, rolling)

    # ------------------------------------------------------------------ generation and chat

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Raises UserError: an engine that generates text overrides this."""
        raise UserError(
            f"the model {type(self).__name__} scores tokens and generates no text; leave out tasks of output_type "
            "generate_until"
        )

    def render_chat(self, chat_history: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """Renders a conversation as text. Raises jinja2.TemplateError if the template rejects it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self.chat_template_args,
            )
        )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Renders a conversation as text, without its system message if the template rejects that."""
        try:
            return self.render_chat(chat_history, add_generation_prompt)
        except jinja2.exceptions.TemplateError:
            logger.warning("the chat template takes no system message; the message is left out")
            return self.render_chat([m for m in chat_history if m["role"] != "system"], add_generation_prompt)
