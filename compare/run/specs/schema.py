"""The schema of spec files. pydantic checks it; `loading` turns its errors into messages for the user."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compare.run.specs.engines import FWD_FNS, LOAD_FNS

Count = Annotated[int, Field(ge=0, strict=True)]
Length = Annotated[int, Field(ge=1, strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Name = Annotated[str, Field(min_length=1)]
Bits = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class HarnessOptions(_Strict):
    """Options of `lm_eval run`, under their own names."""

    num_fewshot: Count | None = None
    batch_size: int | str | None = None
    max_batch_size: Length | None = None
    device: Name | None = None
    apply_chat_template: bool | str | None = None
    fewshot_as_multiturn: bool | None = None
    gen_kwargs: str | dict[str, Any] | None = None
    seed: int | str | None = None
    include_path: Name | None = None
    confirm_run_unsafe_code: Flag | None = None


class _Entry(_Strict):
    """The fields of both forms of a model's entry: how it is shown, and figures that replace measured ones."""

    label: Name | None = None
    family: Name | None = None
    override_bpw_layer: Bits | None = None
    override_bpw_head: Bits | None = None
    override_vram_bits: Bits | None = None
    tasks: list[Name] | None = None
    gpus: Length = 1
    options: HarnessOptions = HarnessOptions()


class GuideModel(_Entry):
    """One model in the form of ExLlamaV3's compare_q; `args`, more arguments for the engine, are our addition."""

    load_fn: Literal[tuple(LOAD_FNS)]  # type: ignore[valid-type]
    fwd_fn: Literal[FWD_FNS] | None = None  # type: ignore[valid-type]
    model_dir: Name | Annotated[list[Any], Field(min_length=2, max_length=2)]
    out_logits: Name | None = None
    args: dict[str, Any] = {}

    @model_validator(mode="after")
    def _fits(self) -> GuideModel:
        row = LOAD_FNS[self.load_fn]
        if self.fwd_fn is not None and self.fwd_fn not in row.fwd_fns:
            raise ValueError(
                f"fwd_fn {self.fwd_fn!r} does not go with load_fn {self.load_fn!r}; use {row.fwd_fns[0]!r}"
            )
        if isinstance(self.model_dir, list):
            if not row.folder_list:
                raise ValueError(
                    f"model_dir as [folder, overrides] is for exllamav3; load_fn {self.load_fn!r} takes a path"
                )
            if not isinstance(self.model_dir[0], str) or not self.model_dir[0]:
                raise ValueError("model_dir: expected [folder, overrides], the folder as text")
        return self


class HarnessModel(_Entry):
    """One model in our own form: any model of the harness with its arguments."""

    model: Name
    args: dict[str, Any] = {}
    reference: Flag = False


class DataSpec(_Strict):
    """The text and windows of all models: compare_q's data spec, with our `tasks`, `metadata`, `text_path`, `bos` …"""

    tokenize_fn: Literal["transformers"] = "transformers"
    tokenizer_dir: Name | None = None
    dataset: Name | None = None
    eval_stride: Length | None = None
    eval_len: Length | None = None
    max_rows: Count = 0
    chat_template: Flag = False
    warmup_tokens: Count = 0
    dataset_path: Name | None = None
    dataset_name: Name | None = None
    dataset_split: Name | None = Field(None, alias="split")
    dataset_files: Name | None = Field(None, alias="dataset_data_files")
    text_column: Name | None = None
    max_text_rows: Count = Field(0, alias="max_dataset_rows")
    # accepted for compare_q's subtitle, but not used: our plots show what was really run
    dataset_display_name: str | None = None
    display_rows: int | None = None
    display_eval_len: int | None = None

    blank_rows: Literal["keep", "drop"] | None = None
    bos: Name | None = None
    text_path: Name | None = None
    tasks: list[Name] | None = None
    metadata: dict[str, Any] = {}
    options: HarnessOptions = HarnessOptions()

    @model_validator(mode="after")
    def _fits(self) -> DataSpec:
        if self.eval_len is not None and self.warmup_tokens > self.eval_len - 2:
            raise ValueError(f"warmup_tokens {self.warmup_tokens} leaves nothing to score of eval_len {self.eval_len}")
        if not (self.dataset or self.dataset_path or self.text_path or self.tasks):
            raise ValueError('names no text: expected "dataset" (such as "wiki2"), "text_path" or "tasks"')
        return self
