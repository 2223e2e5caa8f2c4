"""`hf_quant`: all models that Transformers loads, on the harness' `HFLM`.

Tested with transformers 5.19 and lm-eval 0.4.13. Quantized checkpoints are loaded as their config.json says and
with nothing added: `dequantize=True` silently drops the activation quantization of a W4A4 checkpoint from
compressed-tensors 0.20 on. Formats that Transformers does not know, or misreads, are decoded first (decoded.py).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lmeval_ext.errors import MissingEngineError, UserError, first_line
from lmeval_ext.models.hf.messages import explain
from lmeval_ext.models.loading import default_label, local_checkpoint
from lmeval_ext.models.observed import Observed, WindowParts
from lmeval_ext.models.record import GIB, Quantization, from_storage, quantized_at_load
from lmeval_ext.models.shared_contexts import group_requests, split_groups
from lmeval_ext.requests import AnswerRequest, WindowRequest, WindowScores, same_shape
from lmeval_ext.storage.tensors import Header
from lmeval_ext.tokens import ending_tokens, special_tokens

try:
    import torch
    import transformers
    from accelerate.utils import find_executable_batch_size
    from huggingface_hub import snapshot_download
    from lm_eval.models.huggingface import HFLM

    from lmeval_ext.decoding.checkpoint import checked_precision, decoding_method
    from lmeval_ext.decoding.stored import has_only_pickles, header_of, load_pickles
    from lmeval_ext.divergence.head import OutputHead
    from lmeval_ext.models.hf.checks import some
    from lmeval_ext.models.hf.decoded import DecodingClass, dense_config, with_deciding_files
    from lmeval_ext.models.hf.dtypes import FLOATS, main_dtype, other_dtypes, unify_dtype
    from lmeval_ext.models.hf.first_forward import PROBE, first_forward
    from lmeval_ext.models.hf.kernels import kernel_name, prefer_exact
    from lmeval_ext.models.hf.loading import CheckedClass, quant_method
    from lmeval_ext.models.hf.rotary import depends_on_length, forget_lengths
    from lmeval_ext.models.hf.scoring import WHOLE_TOKENS, captured_states, logits_in_parts, states_alone
    from lmeval_ext.models.hf.shared_contexts import NotShared, SharedContexts, can_share
except ImportError as error:
    raise MissingEngineError(
        f"hf_quant needs torch and Transformers ({first_line(error)}); install them: pip install 'lmeval-ext[quant]'"
    ) from error
from tqdm import tqdm

logger = logging.getLogger(__name__)

_BATCH_TOKENS = 131072  # of the first batch that batch_size=auto tries


class HFQuantized(Observed, HFLM):
    """Runs Transformers checkpoints: dense, compressed-tensors, AWQ, GPTQ, bitsandbytes, VPTQ, AQLM, …; EXL3, EXL2.

    Arguments are those of the harness' `hf`, and label=, the model's name in tables and plots. device defaults to a
    GPU if there is one; softmax_dtype to float32 (with the harness' default, bfloat16 models have log-softmax in
    bfloat16, and sums are rounded to whole numbers). multimodal=True loads a model that also sees pictures, with all
    its parts, and runs its text part. reference= and save_reference= measure divergence (docs/metrics.md). Weights are
    read from safetensors only; allow_pickle=True also reads a decoded format from pytorch_model.bin, with
    torch.load(weights_only=True). Formats that Transformers does not know or misreads (EXL3, EXL2, AQLM, VPTQ, QTIP,
    Any-Precision, HQQ, FP8 of AutoFP8 and ModelOpt, ModelOpt's NVFP4) are decoded to dense weights at load, by default
    to float32 on a CPU and float16 elsewhere. precision=: bits per weight of an Any-Precision checkpoint.
    """

    engine_packages = ("transformers",)
    stock_models = ("hf", "huggingface", "hf-multimodal")
    reference_modes = ("hidden", "logits")
    neutral_arguments = frozenset({"use_safetensors", "softmax_dtype", "allow_pickle"})
    _config: Any  # the harness': the model's config
    batch_size_per_gpu: Any  # the harness': rows, or "auto"
    _pickled_headers: list[Header] | None = None  # of a decoded checkpoint in PyTorch's pickles

    def __init__(
        self,
        pretrained: Any,
        label: str | None = None,
        device: str | None = None,
        multimodal: bool = False,
        allow_pickle: bool = False,
        **kwargs: Any,
    ) -> None:
        self.label = label or default_label(pretrained)
        self.take_reference_arguments(kwargs)
        self._decoded: str | None = None  # the checkpoint's folder, if its weights are decoded at load
        # In kwargs until here, so that it is part of a reference's identity
        self._precision: int | None = kwargs.pop("precision", None)
        self._allow_pickle = allow_pickle
        self._ran_decoded = False  # by us, or by Transformers
        self._loading_notes: list[str] = []
        if multimodal:
            self.AUTO_MODEL_CLASS = transformers.AutoModelForImageTextToText
        kwargs.setdefault("softmax_dtype", "float32")
        if isinstance(pretrained, str) and not kwargs.get("gguf_file"):
            kwargs.setdefault("use_safetensors", True)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if not torch.cuda.is_available():
            kwargs.pop("parallelize", None)  # spreads over GPUs; HFLM would look for one
        try:
            super().__init__(pretrained=pretrained, device=device, **kwargs)
        except Exception as error:
            raise explain(error, pretrained, kwargs.get("tokenizer")) from error
        if label is None and self._precision is not None:
            self.label += f"-{self._precision}bit"  # each precision of a checkpoint is a point of its own
        self._gguf_file = kwargs.get("gguf_file")
        # With this argument, models run the output matrix only on the positions that predict a target
        self._keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        dtype = kwargs.get("dtype", "auto")
        dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        unify_dtype(self.model, dtype if isinstance(pretrained, str) else None)
        self._length_decides = depends_on_length(self.model.config)
        if self._length_decides:
            forget_lengths(self.model)
        ids = [i for i in self.tok_encode(PROBE) if i < self.config.get_text_config().vocab_size]
        seq2seq = self.backend != "causal"
        name = f"pretrained={pretrained!r}" if isinstance(pretrained, str) else type(pretrained).__name__
        first = first_forward(self.model, ids or [0], name, kwargs.get("attn_implementation"), seq2seq)
        self._settings, self._notes = first.settings, first.notes

    # The two hooks of HFLM (0.4.13) through which decoded formats become dense weights: the first sets the config, by
    # which the harness asks Transformers for a quantizer; the second calls from_pretrained.
    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        super()._get_config(pretrained, **kwargs)
        folder = None if kwargs.get("gguf_file") else local_checkpoint(pretrained, kwargs.get("revision"))
        place = kwargs.get("subfolder") or ""
        if folder and not Path(pretrained).exists():
            folder = with_deciding_files(pretrained, kwargs.get("revision"), folder, place)
        if folder and decoding_method(Path(folder, place)):
            if not Path(pretrained).exists():  # a hub id, of which only the config has been fetched so far
                folder = snapshot_download(pretrained, revision=kwargs.get("revision"))
            self._decoded = str(Path(folder, place))
            self._config = dense_config(self._config)
        if self._decoded or self._precision is not None:
            self._precision = checked_precision(Path(self._decoded or pretrained), self._precision)

    def _create_model(self, pretrained: str, **kwargs: Any) -> None:
        auto_class, decode = self.AUTO_MODEL_CLASS, self._decoded is not None
        options = {"precision": self._precision, "allow_pickle": self._allow_pickle}
        loader: DecodingClass | CheckedClass = (
            DecodingClass(auto_class, self.config, self.device, **options)
            if decode
            else CheckedClass(auto_class, self.config)
        )
        self.AUTO_MODEL_CLASS = loader
        if self.device.type == "cpu":
            prefer_exact(quant_method(self.config), kwargs.get("quantization_config"))
        try:
            super()._create_model(self._decoded or pretrained, **kwargs)
        finally:
            self.AUTO_MODEL_CLASS = auto_class
        self._loading_notes, self._ran_decoded = loader.notes, loader.decoded
        if isinstance(loader, DecodingClass) and self._allow_pickle and has_only_pickles(Path(str(self._decoded))):
            self._pickled_headers = [header_of(Path(str(self._decoded)), load_pickles(Path(str(self._decoded))))]

    @property
    def vocabulary(self) -> int:
        size = int(self.config.get_text_config().vocab_size)
        return size if self._settings is None else min(size, self._settings.columns)

    def score_windows(self, windows: Sequence[WindowRequest]) -> list[WindowScores]:
        results: list[WindowScores | None] = [None] * len(windows)
        batches = same_shape(windows)

        def run(batch_size: int, done: Callable[[int], Any]) -> None:
            for indices in batches:
                todo = [i for i in indices if results[i] is None]
                for start in range(0, len(todo), batch_size):
                    batch = todo[start : start + batch_size]
                    for i, scores in zip(batch, self._score([windows[i] for i in batch]), strict=True):
                        results[i] = scores
                    done(len(batch))

        with self.progress(len(windows)) as done:
            if self.batch_size == "auto":  # halved until it fits; windows that are done are kept
                # A CPU does not report that its memory is too small, so it starts at 1
                longest = max(len(w.ids) for w in windows)
                most = min(int(self.max_batch_size or 64), max(1, _BATCH_TOKENS // longest))
                most = most if self.device.type == "cuda" else 1
                find_executable_batch_size(run, starting_batch_size=most)(done)
            else:
                run(int(self.batch_size), done)
        return [r for r in results if r is not None]

    @torch.inference_mode()
    def _score(self, windows: Sequence[WindowRequest]) -> list[WindowScores]:
        """Scores windows of one shape in one forward. The last token of each predicts nothing and is left out."""
        ids = torch.tensor([w.ids for w in windows], device=self.device)
        kept = len(windows[0].target_ids)
        keep = {"logits_to_keep": kept} if self._keeps else {}
        with torch.autocast(
            self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        ):
            if kept > WHOLE_TOKENS:
                return self._score_in_parts(windows, ids, keep)
            with captured_states(self.model, self.observer is not None) as states:
                logits = self.model(input_ids=ids[:, :-1], use_cache=False, **keep).logits
        logits, targets = logits[:, -kept:], ids[:, -kept:]
        return [
            self.scores_of(window, logits[i], targets[i], states[-1][i, -kept:] if states else None)
            for i, window in enumerate(windows)
        ]

    def _score_in_parts(
        self, windows: Sequence[WindowRequest], ids: torch.Tensor, keep: dict[str, int]
    ) -> list[WindowScores]:
        """Scores long windows, whose logits together would take gigabytes: the output matrix runs on parts of them."""
        layer, kept = self.model.get_output_embeddings(), len(windows[0].target_ids)
        if layer is None or self._settings is None:
            raise UserError(
                f"{self.label}: its logits cannot be computed in parts, since they are not scale × cap × tanh(x / cap) "
                f"of its output matrix' products, and those of {kept} tokens would be in memory at once; set eval_len "
                f"to {WHOLE_TOKENS} at most, or use another engine"
            )
        with states_alone(layer) as states:
            self.model(input_ids=ids[:, :-1], use_cache=False, **keep)
        scores = []
        for i, window in enumerate(windows):
            parts, targets = WindowParts(self, window), ids[i, -kept:]
            hidden = states[-1][i, -kept:]
            for rows, logits in logits_in_parts(layer, self._settings, hidden):
                parts.add(logits, targets[rows], hidden[rows])
            scores.append(parts.scores())
        return scores

    @property
    def windows_at_once(self) -> int:
        return 16 if self.device.type == "cuda" else 1

    @property
    def logits_device(self) -> torch.device | None:
        spread = len(set((getattr(self.model, "hf_device_map", None) or {}).values())) > 1
        return None if spread else torch.device(self.device)

    def output_head(self) -> OutputHead:
        layer = self.model.get_output_embeddings()
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dtype not in FLOATS:
            raise UserError(f"{self.label}: the output matrix is quantized or out of reach; use reference_mode=logits")
        if self._settings is None:
            raise UserError(
                f"{self.label}: its logits are not scale × cap × tanh(x / cap) of its output matrix' products; use "
                "reference_mode=logits"
            )
        bias = getattr(layer, "bias", None)
        return OutputHead(
            weight.data, None if bias is None else bias.data, self._settings.softcap, self._settings.scale
        )

    def checkpoint(self) -> str | None:
        path = local_checkpoint(self.pretrained, self.revision)
        return str(Path(path) / self._gguf_file) if path and self._gguf_file else path

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        if not requests or isinstance(requests[0], WindowRequest) or self.backend != "causal":
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        requests = self.complete_requests(requests)
        # The harness' logits cache (0.4.13) scores the wrong tokens for requests that have the same tokens but another
        # border between context and continuation; sharing contexts saves as much.
        self.logits_cache = False
        results: list[tuple[float, bool] | None] = [None] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Scoring choices of shared contexts") as progress:
            for i, result in self._shared(requests):
                results[i] = result
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
                progress.update()
        rest = [i for i, result in enumerate(results) if result is None]
        if rest:
            kept = self.batch_size_per_gpu
            if self._one_by_one:
                self.batch_size_per_gpu, override_bs = 1, 1
            try:
                others = super()._loglikelihood_tokens(
                    [requests[i] for i in rest], disable_tqdm=disable_tqdm, override_bs=override_bs
                )
            finally:
                self.batch_size_per_gpu = kept
            for i, result in zip(rest, others, strict=True):
                results[i] = result
        return results

    @property
    def _one_by_one(self) -> bool:
        """Whether results depend on the other rows of a batch, so that rows of different lengths go one at a time.

        Rotary frequencies do where the longest row decides, and 16-bit products on a CPU, where batches save no time.
        """
        return self._length_decides or (
            self.device.type == "cpu" and self.model.dtype in (torch.bfloat16, torch.float16)
        )

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Generates as the harness' `hf`; one prompt at a time where the longest one decides for all."""
        kept = self.batch_size_per_gpu
        if self._length_decides:
            self.batch_size_per_gpu = 1
        try:
            texts: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        finally:
            self.batch_size_per_gpu = kept
        return texts

    @torch.inference_mode()
    def answer_ids(self, requests: Sequence[AnswerRequest], done: Callable[[int], Any]) -> list[list[int]]:
        """Answers one prompt at a time: in a batch, padding and the other rows would change the rounding."""
        ends = {self.eot_token_id, *_listed(self.model.generation_config.eos_token_id)} - {None}
        stored, answers = self.model.generation_config, []
        self.model.generation_config = transformers.GenerationConfig()  # no penalty, no stop that is not asked for
        try:
            for request in requests:
                ids = torch.tensor([request.prompt_ids], device=self.device)
                new, stop, temperature, seed = request.settings
                options: dict[str, Any] = {"eos_token_id": sorted(ends)} if stop else {}
                if temperature:
                    torch.manual_seed(seed)
                    options |= {"do_sample": True, "temperature": temperature, "top_k": 0}
                with torch.autocast(
                    self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
                ):
                    whole = self.model.generate(
                        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options
                    )
                answers.append(whole[0, ids.shape[1] :].tolist())
                done(1)
        finally:
            self.model.generation_config = stored
        return answers

    def _shared(self, requests: Any) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Yields (index, result) of the requests that share a context with others, if the model allows sharing."""
        if self.peft or not can_share(self.model.config):
            return
        groups, _ = split_groups(group_requests(requests, self.max_length))
        rows = 64 if str(self.batch_size).startswith("auto") else int(self.batch_size)
        rows = 1 if self._one_by_one else rows
        shared = SharedContexts(self.model, self.vocabulary, self._keeps, self.device)
        try:
            with torch.autocast(
                self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
            ):
                for group in groups:
                    yield from shared.score(group, rows)
        except (NotShared, torch.cuda.OutOfMemoryError) as reason:
            logger.info("the context is computed again for every choice (%s)", type(reason).__name__)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes prompts to generate from, each as `tok_encode` does, whatever else is in the batch."""
        if self.backend != "causal" or truncation:
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
        rows = [self.tok_encode(s, left_truncate_len=left_truncate_len) or [self.prefix_token_id] for s in strings]
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        """Generates as the harness' `hf`, but replaces tokens after a row's stopping special token by padding.

        Such tokens appear while other rows of the batch are not finished yet.
        """
        ids = super()._model_generate(context, max_length=max_length, stop=stop, **kwargs)
        ends = sorted(ending_tokens(special_tokens(self.tokenizer), stop))
        new = ids[:, context.shape[1] :]
        stopped = torch.isin(new, torch.tensor(ends, device=new.device)).long().cumsum(1) > 0
        new[stopped] = self.tokenizer.pad_token_id
        return ids

    def describe(self) -> Quantization:
        stored, running = (quant_method(c) for c in (self.config, self.model.config))
        main = main_dtype(self.model) or self.model.dtype
        dtype = str(main).removeprefix("torch.")
        facts = from_storage(
            self.checkpoint(),
            (dtype, dtype),
            label=self.label,
            engine="transformers",
            engine_version=transformers.__version__,
            kernel=kernel_name(self.model, running),
            dtype=dtype,
            device=str(self.device),
            revision=self.revision,
            scoring="logits",
            headers=self._pickled_headers,
            precision=self._precision,
        )
        if running and running != stored and not self._gguf_file:
            quantized_at_load(facts, running)
        if self._ran_decoded:
            facts.kernel = "decoded"
        facts.notes += self._loading_notes + self._notes
        if others := other_dtypes(self.model, main):
            facts.notes.append(f"not in {dtype}: {some(others)}")
        if self.peft or self.delta:
            facts.notes.append(f"sizes are of the base model, without {self.peft or self.delta!r}")
        if self.device.type == "cuda":
            devices = range(torch.cuda.device_count())
            facts.peak_vram_gb = sum(torch.cuda.max_memory_allocated(d) for d in devices) / GIB
        return facts


def _listed(ids: int | list[int] | None) -> list[int]:
    """Token ids of a field that holds one, several or none."""
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
