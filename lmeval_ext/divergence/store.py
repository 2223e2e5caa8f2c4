"""A reference on disk: one folder, whose parts are each written whole or not at all.

    DIR/reference.json          what it is a reference of, and how logits come of it (`Manifest`)
    DIR/head.safetensors        the output matrix, once (mode "hidden")
    DIR/windows/KEY.safetensors one file a window, named by its tokens

A window's file has what recovers the distributions of its scored tokens: `hidden` [tokens, width], the final hidden
states after the last norm (mode "hidden"), or the tensors of `logits_code` (mode "logits"); and what the run that wrote
it found: `logprobs`, `greedy`, and its own divergence from the stored distributions (`TokenDivergence`), which is the
rounding of its engine. So an interrupted run goes on where it was,
and one folder serves any number of tasks.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lmeval_ext.divergence.head import OutputHead
from lmeval_ext.divergence.measure import TokenDivergence
from lmeval_ext.divergence.store_files import (
    FORMAT,
    VERSION,
    damaged_store,
    failure_text,
    json_sha256,
    read_tensors,
    tensors_sha256,
    unwritable_store,
    verify_checksum,
    write_tensors,
)
from lmeval_ext.errors import UserError
from lmeval_ext.files import write_atomically

_MANIFEST, _HEAD, _WINDOWS = "reference.json", "head.safetensors", "windows"
SCORES = ("logprobs", "greedy", *TokenDivergence._fields)


@dataclass(frozen=True)
class Manifest:
    """reference.json.

    model: label, engine, engine_version, dtype, device, kernel, weights_sha256, config_sha256 and arguments of the
    model that was run. mode: "hidden" or "logits". vocabulary: columns of the softmax. tokenizer_probe: ids of
    `session.PROBE`, to recognize the tokenizer by.
    width, softcap, scale, head_sha256: of the output matrix (`OutputHead`); None in mode "logits".
    """

    model: dict[str, Any]
    mode: str
    vocabulary: int
    tokenizer_probe: list[int]
    width: int | None = None
    softcap: float | None = None
    scale: float | None = None
    head_sha256: str | None = None
    format: str = FORMAT
    version: int = VERSION

    @functools.cached_property
    def id(self) -> str:
        """Two references with the same id have the same distributions. The label is a mere name."""
        facts = asdict(self)
        facts["model"] = {k: v for k, v in self.model.items() if k != "label"}
        return json_sha256(facts)

    def describe(self) -> str:
        m = self.model
        return f"{m.get('label')} ({m.get('engine')} {m.get('engine_version')}, {m.get('dtype')})"


@dataclass
class StoredWindow:
    """One window of a store. states: `hidden`, or the tensors of `logits_code`; scores: the tensors of `SCORES`."""

    key: str
    states: dict[str, torch.Tensor] = field(repr=False)
    scores: dict[str, torch.Tensor] = field(repr=False)

    @property
    def tokens(self) -> int:
        return int(self.scores["logprobs"].shape[0])


class ReferenceStore:
    """A folder with a reference. Raises UserError where it is none, or damaged."""

    def __init__(self, folder: Path | str, manifest: Manifest) -> None:
        self.folder, self.manifest = Path(folder), manifest

    # ------------------------------------------------------------------ opening and creating

    @classmethod
    def open(cls, folder: Path | str) -> ReferenceStore:
        return cls(folder, _read_manifest(Path(folder) / _MANIFEST))

    @classmethod
    def create(cls, folder: Path | str, manifest: Manifest) -> ReferenceStore:
        """The store in `folder`, begun or gone on with. UserError where another model's reference is there."""
        folder = Path(folder)
        path = folder / _MANIFEST
        if path.exists():
            there = _read_manifest(path)
            if there.id != manifest.id:
                raise UserError(
                    f"save_reference={folder}: holds the reference of another model or setting, {there.describe()}, "
                    f"not of {manifest.describe()} ({_difference(there, manifest)}); name another folder, or delete "
                    "that one"
                )
            return cls(folder, there)
        try:
            (folder / _WINDOWS).mkdir(parents=True, exist_ok=True)
            said = {**asdict(manifest), "id": manifest.id}
            write_atomically(path, json.dumps({**said, "sha256": json_sha256(said)}, indent=2).encode())
        except OSError as error:
            raise unwritable_store(folder, error) from error
        return cls(folder, manifest)

    # ------------------------------------------------------------------ the output matrix

    @property
    def head_path(self) -> Path:
        return self.folder / _HEAD

    def has_sound_head(self) -> bool:
        """Whether it is there, whole, and the one that the manifest names."""
        try:
            self.head()
        except UserError:
            return False
        return True

    def write_head(self, head: OutputHead) -> None:
        write_tensors(self.head_path, head.tensors(), {})

    def head(self) -> OutputHead:
        """Checked against the manifest's sum. The file is mapped, not copied: it may be gigabytes."""
        path = self.head_path
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError as error:
            raise damaged_store(path, "it is missing") from error
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise damaged_store(path, failure_text(error)) from error
        verify_checksum(path, tensors_sha256(tensors), about)
        if "weight" not in tensors or about["sha256"] != self.manifest.head_sha256:
            raise damaged_store(path, "its contents are not what reference.json says")
        m = self.manifest
        return OutputHead(tensors["weight"], tensors.get("bias"), m.softcap, 1.0 if m.scale is None else m.scale)

    # ------------------------------------------------------------------ windows

    def path(self, key: str) -> Path:
        return self.folder / _WINDOWS / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        return self.path(key).exists()

    def __len__(self) -> int:
        return sum(1 for _ in (self.folder / _WINDOWS).glob("*.safetensors"))

    def write(self, window: StoredWindow) -> None:
        tensors = {**window.states, **window.scores}
        write_tensors(self.path(window.key), tensors, {"key": window.key, "reference": self.manifest.id})

    def read(self, key: str) -> StoredWindow:
        path = self.path(key)
        tensors, about = read_tensors(path)
        if about.get("key") != key or about.get("reference") != self.manifest.id:
            raise damaged_store(path, "it belongs to another window or another reference")
        states = {name: t for name, t in tensors.items() if name not in SCORES}
        scores = {name: tensors[name] for name in SCORES if name in tensors}
        lengths = {t.shape[0] for t in tensors.values()}
        if set(scores) != set(SCORES) or len(lengths) != 1 or set(states) != set(_STATES[self.manifest.mode]):
            raise damaged_store(path, f"it has the tensors {', '.join(tensors)}")
        return StoredWindow(key, states, scores)

    def own_kld(self, key: str) -> torch.Tensor:
        """The writing engine's own divergence, float32 [tokens]; the file's checksum is not looked at."""
        try:
            with safe_open(self.path(key), framework="pt") as file:
                found: torch.Tensor = file.get_tensor("kld")
        except (SafetensorError, OSError, ValueError) as error:
            raise damaged_store(self.path(key), failure_text(error)) from error
        return found


_STATES = {"hidden": ("hidden",), "logits": ("codes", "range", "top_ids", "top_values")}


def _read_manifest(path: Path) -> Manifest:
    if not path.exists():
        raise UserError(
            f"reference={path.parent}: no {_MANIFEST} there; give a folder that a run with save_reference= has written"
        )
    try:
        said = json.loads(path.read_bytes())
        version = said.get("version") if isinstance(said, dict) else None
        if said["format"] == FORMAT and version != VERSION:
            raise UserError(
                f"{path}: version {version} of the reference format; this release reads version {VERSION}: delete that "
                "folder, or name another, and save the reference anew"
            )
        checksum = said.pop("sha256")
        whole = checksum == json_sha256(said)  # the label too, which is no part of the id
        claimed = said.pop("id")
        manifest = Manifest(**said)
        sound = (
            whole
            and manifest.format == FORMAT
            and manifest.mode in _STATES
            and isinstance(manifest.model, dict)
            and isinstance(manifest.vocabulary, int)
            and manifest.id == claimed
        )
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged_store(path, f"{type(error).__name__}: {error}") from error
    if not sound:
        raise damaged_store(path, "its contents do not fit its checksum")
    return manifest


def _difference(there: Manifest, wanted: Manifest) -> str:
    a, b = ({**{k: v for k, v in asdict(m).items() if k != "model"}, **m.model} for m in (there, wanted))
    names = [n for n in a if a[n] != b.get(n) and n not in ("label", "tokenizer_probe")]
    short = [f"{n}: {str(a[n])[:20]}, here {str(b.get(n))[:20]}" for n in names]
    return "; ".join(short) or "another tokenizer"
