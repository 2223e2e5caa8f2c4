"""Stores a reference in one folder, each of whose parts is written atomically.

    DIR/reference.json          what it is a reference of, and how logits follow from it (`Manifest`)
    DIR/head.safetensors        the output matrix, once (mode "hidden")
    DIR/windows/KEY.safetensors one file per window, named by its key

A window's file has what recovers the distributions of its scored tokens: `hidden` [tokens, width], the final hidden
states after the last norm (mode "hidden"), or the tensors of `logits_code` (mode "logits"). It also has the scores of
the run that wrote it: `logprobs`, `greedy`, and the divergence of its engine's logits from the stored distributions
(`TokenDivergence`), which is the rounding of that engine. So an interrupted run can be resumed, and one folder serves
any number of tasks.
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
    json_sha256,
    read_tensors,
    tensors_sha256,
    unwritable_store,
    verify_checksum,
    write_tensors,
)
from lmeval_ext.errors import UserError, first_line
from lmeval_ext.files import write_atomically

_MANIFEST, _HEAD, _WINDOWS = "reference.json", "head.safetensors", "windows"
SCORES = ("logprobs", "greedy", *TokenDivergence._fields)


@dataclass(frozen=True)
class Manifest:
    """Contents of reference.json: which model was run, and how its logits are recovered.

    model: label, engine, engine_version, dtype, device, kernel, weights_sha256, config_sha256 and arguments of the
    model that was run. mode: "hidden" or "logits". vocabulary: columns of the softmax. tokenizer_probe: ids of
    `tokens.PROBE`, by which the tokenizer is recognized. width, softcap, scale, head_sha256: of the output matrix
    (`OutputHead`); None in mode "logits".
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
        """References with the same id have the same distributions. The label is not part of it."""
        facts = asdict(self)
        facts["model"] = {k: v for k, v in self.model.items() if k != "label"}
        return json_sha256(facts)

    def describe(self) -> str:
        """Label, engine and dtype for messages."""
        m = self.model
        return f"{m.get('label')} ({m.get('engine')} {m.get('engine_version')}, {m.get('dtype')})"


@dataclass
class StoredWindow:
    """One window of a store.

    states: `hidden`, or the tensors of `logits_code`. scores: the tensors named in `SCORES`. All are [tokens, …].
    """

    key: str
    states: dict[str, torch.Tensor] = field(repr=False)
    scores: dict[str, torch.Tensor] = field(repr=False)

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return int(self.scores["logprobs"].shape[0])


class ReferenceStore:
    """A folder with a reference. Methods that read raise UserError for damage, those that write if they cannot."""

    def __init__(self, folder: Path | str, manifest: Manifest) -> None:
        self.folder, self.manifest = Path(folder), manifest

    # ------------------------------------------------------------------ opening and creating

    @classmethod
    def open(cls, folder: Path | str) -> ReferenceStore:
        """The store in `folder`. Raises UserError if there is none, or if its manifest is damaged."""
        return cls(folder, _read_manifest(Path(folder) / _MANIFEST))

    @classmethod
    def create(cls, folder: Path | str, manifest: Manifest) -> ReferenceStore:
        """The store in `folder`, new or resumed. Raises UserError if the folder holds another model's reference."""
        folder = Path(folder)
        path = folder / _MANIFEST
        if path.exists():
            existing = _read_manifest(path)
            if existing.id != manifest.id:
                raise UserError(
                    f"save_reference={folder}: holds the reference of another model or setting, {existing.describe()}, "
                    f"not of {manifest.describe()} ({_difference(existing, manifest)}); name another folder, or delete "
                    "that one"
                )
            return cls(folder, existing)
        try:
            (folder / _WINDOWS).mkdir(parents=True, exist_ok=True)
            content = {**asdict(manifest), "id": manifest.id}
            write_atomically(path, json.dumps({**content, "sha256": json_sha256(content)}, indent=2).encode())
        except OSError as error:
            raise unwritable_store(folder, error) from error
        return cls(folder, manifest)

    # ------------------------------------------------------------------ the output matrix

    @property
    def head_path(self) -> Path:
        return self.folder / _HEAD

    def has_sound_head(self) -> bool:
        """Whether the output matrix exists, is undamaged, and is the one that the manifest names."""
        try:
            self.head()
        except UserError:
            return False
        return True

    def write_head(self, head: OutputHead) -> None:
        write_tensors(self.head_path, head.tensors(), {})

    def head(self) -> OutputHead:
        """The output matrix. Raises UserError if it does not match the manifest's checksum.

        The file is mapped, not copied: it may have gigabytes.
        """
        path = self.head_path
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError as error:
            raise damaged_store(path, "it is missing") from error
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise damaged_store(path, first_line(error)) from error
        verify_checksum(path, tensors_sha256(tensors), metadata)
        if "weight" not in tensors or metadata["sha256"] != self.manifest.head_sha256:
            raise damaged_store(path, "its contents are not those named in reference.json")
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
        tensors, metadata = read_tensors(path)
        if metadata.get("key") != key or metadata.get("reference") != self.manifest.id:
            raise damaged_store(path, "it belongs to another window or another reference")
        states = {name: t for name, t in tensors.items() if name not in SCORES}
        scores = {name: tensors[name] for name in SCORES if name in tensors}
        lengths = {t.shape[0] for t in tensors.values()}
        if set(scores) != set(SCORES) or len(lengths) != 1 or set(states) != set(_STATES[self.manifest.mode]):
            raise damaged_store(path, f"it has the tensors {', '.join(tensors)}")
        return StoredWindow(key, states, scores)

    def own_kld(self, key: str) -> torch.Tensor:
        """Divergence of the engine that wrote the window, float32 [tokens]; does not verify the file's checksum."""
        try:
            with safe_open(self.path(key), framework="pt") as file:
                kld: torch.Tensor = file.get_tensor("kld")
        except (SafetensorError, OSError, ValueError) as error:
            raise damaged_store(self.path(key), first_line(error)) from error
        return kld


_STATES = {"hidden": ("hidden",), "logits": ("codes", "range", "top_ids", "top_values")}


def _read_manifest(path: Path) -> Manifest:
    if not path.exists():
        raise UserError(
            f"reference={path.parent}: no {_MANIFEST} there; give a folder that a run with save_reference= has written"
        )
    try:
        content = json.loads(path.read_bytes())
        version = content.get("version") if isinstance(content, dict) else None
        if content["format"] == FORMAT and version != VERSION:
            raise UserError(
                f"{path}: version {version} of the reference format; this release reads version {VERSION}: delete that "
                "folder, or name another, and save the reference again"
            )
        checksum = content.pop("sha256")
        undamaged = checksum == json_sha256(content)  # covers the label too, which is not part of the id
        stored_id = content.pop("id")
        manifest = Manifest(**content)
        sound = (
            undamaged
            and manifest.format == FORMAT
            and manifest.mode in _STATES
            and isinstance(manifest.model, dict)
            and isinstance(manifest.vocabulary, int)
            and manifest.id == stored_id
        )
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged_store(path, f"{type(error).__name__}: {error}") from error
    if not sound:
        raise damaged_store(path, "its contents do not fit its checksum")
    return manifest


def _difference(existing: Manifest, current: Manifest) -> str:
    """The fields in which both differ, for a message."""
    a, b = ({**{k: v for k, v in asdict(m).items() if k != "model"}, **m.model} for m in (existing, current))
    names = [n for n in a if a[n] != b.get(n) and n not in ("label", "tokenizer_probe")]
    differences = [f"{n}: {str(a[n])[:20]}, here {str(b.get(n))[:20]}" for n in names]
    return "; ".join(differences) or "another tokenizer"
