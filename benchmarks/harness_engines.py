"""Ways that `harness_tasks.py` times, by engine: the adapter, the harness' stock class, the engine's batch API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Way = Callable[[Any], Any]  # returns the number of generated tokens where that may differ from the one requested
Ways = dict[str, Way]
LENGTH = 2048  # tokens of the longest sequence


def instances(texts: Sequence[str], arguments: dict[str, Any]) -> list[Any]:
    """Returns the harness' requests to continue each text."""
    from lm_eval.api.instance import Instance

    return [Instance("generate_until", {}, (text, dict(arguments)), i) for i, text in enumerate(texts)]


def prompts(requests: Any) -> list[list[int]]:
    """Returns the token ids of each (None, context, continuation)."""
    return [context + continuation for _, context, continuation in requests]


class Engine:
    """A loaded adapter and the ways to use it.

    more: generation arguments, as a task's YAML would give them. stock: the harness' class of the same engine, if any.
    """

    stock: Any = None

    def __init__(self, model: Any, new_tokens: int, **more: Any) -> None:
        self.model, self.new = model, new_tokens
        self.arguments = {"until": [], "do_sample": False, "max_gen_toks": new_tokens, **more}
        self.vocabulary = int(model.vocabulary)

    def encode(self, text: str) -> list[int]:
        return list(self.model.tok_encode(text))

    def text(self, ids: list[int]) -> str:
        return str(self.model.tokenizer.decode(ids))

    def most_prompts(self, count: int) -> int:
        """Returns how many of `count` prompts one run may take."""
        return count

    def choices(self) -> Ways:
        """Returns the ways to score multiple choice, by name."""
        ways: Ways = {"ours": lambda requests: self.model._loglikelihood_tokens(requests, disable_tqdm=True)}
        if self.stock is not None:
            ways["stock"] = lambda requests: self.stock._loglikelihood_tokens(self.model, requests, disable_tqdm=True)
        return ways | self.engine_choices()

    def generation(self) -> Ways:
        """Returns the ways to continue texts, by name."""
        ways: Ways = {"ours": lambda texts: self._checked(self.model.generate_until, texts)}
        if self.stock is not None:
            ways["stock"] = lambda texts: self._checked(lambda r: self.stock.generate_until(self.model, r), texts)
        return ways | self.engine_generation()

    def _checked(self, generate: Callable[[Any], list[str]], texts: list[str]) -> int | None:
        outputs = generate(instances(texts, self.arguments))
        assert len(outputs) == len(texts)
        return None

    def engine_choices(self) -> Ways:
        """Returns the engine's own ways to score or compute prompts."""
        raise NotImplementedError

    def engine_generation(self) -> Ways:
        """Returns the engine's own ways to generate."""
        raise NotImplementedError


class Transformers(Engine):
    """`hf_quant`; stock: `hf`; engine: one padded forward or one `generate` per batch."""

    def __init__(self, path: str, new_tokens: int, batch_size: int, **arguments: Any) -> None:
        from lmeval_ext.models.hf.adapter import HFLM, HFQuantized

        model = HFQuantized(path, batch_size=batch_size, **{"max_length": LENGTH, **arguments})
        super().__init__(model, new_tokens, min_new_tokens=new_tokens)
        self.stock, self.batch_size = HFLM, batch_size

    def engine_choices(self) -> Ways:
        return {"engine": self._forward}

    def _forward(self, requests: Any) -> None:
        import torch

        ordered = sorted(prompts(requests), key=len)
        for start in range(0, len(ordered), self.batch_size):
            rows = [torch.tensor(ids) for ids in ordered[start : start + self.batch_size]]
            padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.model.device)
            with torch.inference_mode():
                self.model.model(input_ids=padded, use_cache=False, logits_to_keep=16)

    def engine_generation(self) -> Ways:
        return {"engine": self._generate}

    def _generate(self, texts: list[str]) -> None:
        tokenizer = self.model.tokenizer
        for start in range(0, len(texts), self.batch_size):
            batch = texts[start : start + self.batch_size]
            padded = tokenizer(batch, padding=True, padding_side="left", return_tensors="pt").to(self.model.device)
            output = self.model.model.generate(
                input_ids=padded["input_ids"],
                attention_mask=padded["attention_mask"],
                do_sample=False,
                max_new_tokens=self.new,
                min_new_tokens=self.new,
                pad_token_id=tokenizer.pad_token_id,
            )
            assert output.shape[1] == padded["input_ids"].shape[1] + self.new
            tokenizer.batch_decode(output)


class VLLM(Engine):
    """`vllm_nvfp4`; stock: `vllm`; engine: `LLM.generate` on all prompts at once."""

    def __init__(self, path: str, new_tokens: int, batch_size: int, **arguments: Any) -> None:
        from lmeval_ext.models.vllm import adapter as vllm_nvfp4

        model = vllm_nvfp4.VLLMQuantized(path, **{"max_model_len": LENGTH, **arguments})
        super().__init__(model, new_tokens, min_tokens=new_tokens, ignore_eos=True)
        self.stock = vllm_nvfp4.VLLM

    def engine_choices(self) -> Ways:
        return {
            "engine": lambda requests: self._generate(prompts(requests), max_tokens=1, prompt_logprobs=0),
            "bare": lambda requests: self._generate(prompts(requests), max_tokens=1, detokenize=False),
        }

    def engine_generation(self) -> Ways:
        return {"engine": self._texts}

    def _texts(self, texts: list[str]) -> None:
        outputs = self._generate(
            [self.encode(text) for text in texts], max_tokens=self.new, min_tokens=self.new, ignore_eos=True
        )
        assert all(len(output.outputs[0].token_ids) == self.new for output in outputs)

    def _generate(self, sequences: list[list[int]], **sampling: Any) -> Any:
        import vllm

        params = vllm.SamplingParams(temperature=0, **sampling)
        tokens = [vllm.TokensPrompt(prompt_token_ids=ids) for ids in sequences]
        return self.model.model.generate(tokens, sampling_params=params, use_tqdm=False)


class LlamaCpp(Engine):
    """`llamacpp`; engine: `Llama.eval` and `Llama.create_completion`. No stock class runs llama.cpp in process.

    The model may stop early, so generated tokens are counted: a logit bias against the end token is applied in a Python
    loop over the vocabulary, which takes longer than the model.
    """

    def __init__(self, path: str, new_tokens: int, batch_size: int, **arguments: Any) -> None:
        from lmeval_ext.models.llamacpp.adapter import LlamaCpp as Adapter

        super().__init__(Adapter(path, **{"max_length": LENGTH, **arguments}), new_tokens)

    def text(self, ids: list[int]) -> str:
        return str(self.model.llama.detokenize(ids).decode(errors="replace"))

    def engine_choices(self) -> Ways:
        return {"engine": self._eval}

    def _eval(self, requests: Any) -> None:
        for prompt in prompts(requests):
            self.model.llama.reset()
            self.model.llama.eval(prompt)
        self.model.scorer.forget()  # the calls above overwrote the cache that the adapter remembers

    def _checked(self, generate: Callable[[Any], list[str]], texts: list[str]) -> int:
        count, tokens = 0, self.model.llama.generate

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            for token in tokens(*args, **kwargs):
                count += 1
                yield token

        self.model.llama.generate = counted
        try:
            super()._checked(generate, texts)
        finally:
            del self.model.llama.generate
        return count

    def engine_generation(self) -> Ways:
        return {"engine": self._complete}

    def _complete(self, texts: list[str]) -> int:
        complete = self.model.llama.create_completion
        outputs = [complete(self.encode(text), max_tokens=self.new, temperature=0) for text in texts]
        return sum(int(output["usage"]["completion_tokens"]) for output in outputs)


class ExLlama(Engine):
    """`exllamav3`, `exllamav2`; engine: jobs that go straight to its dynamic generator. The harness has no class."""

    adapter = ""

    def __init__(self, path: str, new_tokens: int, batch_size: int, **arguments: Any) -> None:
        import importlib

        module, name = self.adapter.split(":")
        model = getattr(importlib.import_module(module), name)(path, **{"max_length": LENGTH, **arguments})
        super().__init__(model, new_tokens)

    def most_prompts(self, count: int) -> int:
        """Fewer where the generator runs one prompt at a time (ExLlamaV2 without flash-attn)."""
        paged = getattr(self.model.generator().wrapped, "paged", True)
        return count if paged else min(count, 4)

    def _checked(self, generate: Callable[[Any], list[str]], texts: list[str]) -> int | None:
        generator = self.model.generator()
        submit = generator.submit

        def endless(prompt: Any) -> None:
            prompt.stop_tokens, prompt.stop_strings = [], []
            submit(prompt)

        generator.submit = endless
        try:
            return super()._checked(generate, texts)
        finally:
            del generator.submit

    def engine_choices(self) -> Ways:
        """One new token per prompt: the generator shares full pages of prompts and returns no scores of them."""
        return {"bare": lambda requests: self._jobs(prompts(requests), 1)}

    def engine_generation(self) -> Ways:
        return {"engine": lambda texts: self._jobs([self.encode(text) for text in texts], self.new)}

    def _jobs(self, sequences: list[list[int]], new: int) -> None:
        import torch

        generator = self.model.generator().wrapped
        for index, ids in enumerate(sequences):
            generator.enqueue(self.job(torch.tensor([ids]), new, index))
        count = 0
        while generator.num_remaining_jobs():
            for result in generator.iterate():
                parts = (result, result.get("held") or {} if result.get("eos") else {})
                count += sum(p["token_ids"].numel() for p in parts if p.get("token_ids") is not None)
        assert count == new * len(sequences), f"{count} tokens of {new * len(sequences)}"

    def job(self, ids: Any, new: int, index: int) -> Any:
        """Returns a greedy job that generates exactly `new` tokens."""
        raise NotImplementedError


class ExLlamaV3(ExLlama):
    adapter = "lmeval_ext.models.exllama.v3.adapter:ExLlamaV3"

    def job(self, ids: Any, new: int, index: int) -> Any:
        from exllamav3 import Job
        from exllamav3.generator.sampler import ArgmaxSampler

        return Job(input_ids=ids, max_new_tokens=new, sampler=ArgmaxSampler(), stop_conditions=[], identifier=index)


class ExLlamaV2(ExLlama):
    adapter = "lmeval_ext.models.exllama.v2.adapter:ExLlamaV2Model"

    def job(self, ids: Any, new: int, index: int) -> Any:
        from exllamav2.generator import ExLlamaV2DynamicJob, ExLlamaV2Sampler

        greedy = ExLlamaV2Sampler.Settings.greedy()
        return ExLlamaV2DynamicJob(
            input_ids=ids, max_new_tokens=new, gen_settings=greedy, stop_conditions=[], identifier=index
        )


ENGINES: dict[str, Callable[..., Engine]] = {
    "hf_quant": Transformers,
    "vllm_nvfp4": VLLM,
    "llamacpp": LlamaCpp,
    "exllamav3": ExLlamaV3,
    "exllamav2": ExLlamaV2,
}
