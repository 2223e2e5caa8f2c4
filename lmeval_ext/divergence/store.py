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
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lmeval_ext.divergence.head import OutputHead
from lmeval_ext.divergence.measure import TokenDivergence
from lmeval_ext.errors import UserError
from lmeval_ext.requests import WindowRequest
from lmeval_ext.storage.info import StorageError
from lmeval_ext.storage.safetensors_header import header_tensors

FORMAT, VERSION = "lmeval-ext reference", 2
_MANIFEST, _HEAD, _WINDOWS = "reference.json", "head.safetensors", "windows"
_IN_MEMORY = 1 << 30
_PIECE = 16 << 20  # bytes that are hashed as one; part of the format
_THREADS = min(8, os.cpu_count() or 1)  # hashing releases the interpreter's lock
_IN_USE = 2  # windows that a step of an engine may still come back to
_READERS = 2  # ahead of any engine; more only take the interpreter's lock from it
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
        return _json_sha256(facts)

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


def window_key(ids: Sequence[int], n_context: int) -> str:
    """What a window is known by: its token ids, and from which on they are scored."""
    return hashlib.sha256(np.array([n_context, *ids], dtype="<i8").tobytes()).hexdigest()[:32]


def key_of(window: WindowRequest) -> str:
    """`window_key` of a task's window, worked out once."""
    known: str | None = getattr(window, "_key", None)
    if known is None:
        known = window_key(window.ids, len(window.context_ids))
        setattr(window, "_key", known)  # noqa: B010 (no field of the request)
    return known


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
            write_atomically(path, json.dumps({**said, "sha256": _json_sha256(said)}, indent=2).encode())
        except OSError as error:
            raise _unwritable(folder, error) from error
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
        _write_tensors(self.head_path, head.tensors(), {})

    def head(self) -> OutputHead:
        """Checked against the manifest's sum. The file is mapped, not copied: it may be gigabytes."""
        path = self.head_path
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError as error:
            raise _damaged(path, "it is missing") from error
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise _damaged(path, _reason(error)) from error
        _check_sum(path, tensors_sha256(tensors), about)
        if "weight" not in tensors or about["sha256"] != self.manifest.head_sha256:
            raise _damaged(path, "its contents are not what reference.json says")
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
        _write_tensors(self.path(window.key), tensors, {"key": window.key, "reference": self.manifest.id})

    def read(self, key: str) -> StoredWindow:
        path = self.path(key)
        tensors, about = _read_tensors(path)
        if about.get("key") != key or about.get("reference") != self.manifest.id:
            raise _damaged(path, "it belongs to another window or another reference")
        states = {name: t for name, t in tensors.items() if name not in SCORES}
        scores = {name: tensors[name] for name in SCORES if name in tensors}
        lengths = {t.shape[0] for t in tensors.values()}
        if set(scores) != set(SCORES) or len(lengths) != 1 or set(states) != set(_STATES[self.manifest.mode]):
            raise _damaged(path, f"it has the tensors {', '.join(tensors)}")
        return StoredWindow(key, states, scores)

    def own_kld(self, key: str) -> torch.Tensor:
        """The writing engine's own divergence, float32 [tokens]; the file's checksum is not looked at."""
        try:
            with safe_open(self.path(key), framework="pt") as file:
                found: torch.Tensor = file.get_tensor("kld")
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(self.path(key), _reason(error)) from error
        return found

    def windows(self, keys: Iterable[str]) -> Windows:
        """These windows, read from now on."""
        return Windows(self, list(dict.fromkeys(keys)))


class Windows(Mapping[str, StoredWindow]):
    """Windows of a store, each read and checked while those before it are looked at.

    Best asked for in the order given. Up to 1 GiB of them are in memory; those that were asked for longest ago make
    room for those to come, and are read again if they are wanted once more. Whoever asks for a window is told
    (UserError) of any damage that was found by then.
    """

    def __init__(self, store: ReferenceStore, keys: list[str]) -> None:
        self._store, self._keys, self._to_come = store, keys, dict.fromkeys(keys)
        self._held: dict[str, tuple[int, Future[StoredWindow]]] = {}  # bytes, window
        self._asked_for: dict[str, None] = {}  # of those held, the last one last
        self._damage: list[BaseException] = []
        self._alone: StoredWindow | None = None  # read when it was asked for
        self._room, self._pool = _IN_MEMORY, ThreadPoolExecutor(_READERS)
        self._read_ahead()

    def _read_ahead(self) -> None:
        while self._to_come:
            key = next(iter(self._to_come))
            path = self._store.path(key)
            size = path.stat().st_size if path.exists() else 0  # what is missing is told by who reads it
            # The last of all that are held is kept as long as the next ones are not looked at
            in_use = _IN_USE if len(self._held) > len(self._asked_for) else 1
            while self._room < size and len(self._asked_for) > in_use:
                oldest = next(iter(self._asked_for))
                del self._asked_for[oldest]
                self._room += self._held.pop(oldest)[0]
            if self._room < size:
                return
            del self._to_come[key]
            self._room -= size
            coming = self._pool.submit(self._store.read, key)
            coming.add_done_callback(functools.partial(_note, self._damage))
            self._held[key] = size, coming

    def close(self) -> None:
        """Read no more ahead."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __getitem__(self, key: str) -> StoredWindow:
        if self._damage:
            raise self._damage[0]
        if key in self._held:
            self._asked_for.pop(key, None)
            self._asked_for[key] = None
            found = self._held[key][1].result()
            self._read_ahead()
            return found
        if key not in self._keys:
            raise KeyError(key)
        if self._alone is None or self._alone.key != key:
            self._to_come.pop(key, None)
            self._alone = None  # room first
            self._alone = self._store.read(key)
        return self._alone

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _note(damage: list[BaseException], read: Future[StoredWindow]) -> None:
    # Of no `Windows`: futures keep their callbacks, and so what those belong to
    error = None if read.cancelled() else read.exception()
    if error is not None:
        damage.append(error)


_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I16": torch.int16,
    "I32": torch.int32, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_STATES = {"hidden": ("hidden",), "logits": ("codes", "range", "top_ids", "top_values")}


def _json_sha256(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Over names, dtypes, shapes, and the SHA-256 of every 16 MiB of bytes: an output matrix on as many cores."""
    return _sha256_of({name: _Part.of(tensor) for name, tensor in tensors.items()})


class _Part(NamedTuple):
    """A tensor, as files have it."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Part:
        whole = tensor.detach().contiguous().cpu()
        name = _NAMES.get(whole.dtype, str(whole.dtype))
        return cls(name, tuple(whole.shape), memoryview(whole.view(-1).view(torch.uint8).numpy()))


def _sha256_of(parts: Mapping[str, _Part]) -> str:
    digest = hashlib.sha256()
    for name in sorted(parts):
        dtype, shape, data = parts[name]
        digest.update(f"{name} {dtype} {list(shape)} ".encode())
        pieces = [data[start : start + _PIECE] for start in range(0, len(data), _PIECE)]
        if len(pieces) < 2:
            digest.update(b"".join(map(_sha256, pieces)))
            continue
        with ThreadPoolExecutor(_THREADS) as pool:
            digest.update(b"".join(pool.map(_sha256, pieces)))
    return digest.hexdigest()


def _sha256(data: memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def write_atomically(path: Path, data: bytes) -> None:
    """The whole file, or what was there before: under another name first, then renamed."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        scratch = Path(file.name)
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            scratch.chmod(0o666 & ~_umask())
            scratch.replace(path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor], about: dict[str, str]) -> None:
    plain = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    about = {**about, "format": FORMAT, "version": str(VERSION), "sha256": tensors_sha256(plain)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(plain, about))
    except OSError as error:
        raise _unwritable(path.parent, error) from error


def _read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and metadata of a file, checked against the sum in it.

    It is opened once: safetensors' own reader opens a file twice, and another run may replace it in between. The
    tensors are views of what was read: copies would cost more than the reading, and hold the interpreter's lock.
    """
    try:
        with path.open("rb") as file:
            data = torch.from_numpy(np.empty(os.fstat(file.fileno()).st_size, dtype=np.uint8))
            whole = memoryview(data.numpy())
            if file.readinto(whole) != len(whole):
                raise _damaged(path, "it was cut short while it was read")
        raw = bytes(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
        stored, about = header_tensors(path, raw, len(whole))
        parts = {t.name: _Part(t.dtype, t.shape, whole[t.offset : t.offset + t.nbytes]) for t in stored}
        tensors = {t.name: data[t.offset : t.offset + t.nbytes].view(_DTYPES[t.dtype]).view(t.shape) for t in stored}
    except FileNotFoundError as error:
        raise _damaged(path, "it is missing") from error
    except (StorageError, OSError, KeyError, RuntimeError) as error:
        raise _damaged(path, _reason(error)) from error
    _check_sum(path, _sha256_of(parts), about)
    return tensors, about


def _check_sum(path: Path, found: str, about: Mapping[str, str]) -> None:
    if (about.get("format"), about.get("version")) != (FORMAT, str(VERSION)):
        raise _damaged(path, f"it is no part of a reference of version {VERSION}")
    if about.get("sha256") != found:
        raise _damaged(path, "its checksum is wrong")


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
        whole = checksum == _json_sha256(said)  # the label too, which is no part of the id
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
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if not sound:
        raise _damaged(path, "its contents do not fit its checksum")
    return manifest


def _difference(there: Manifest, wanted: Manifest) -> str:
    a, b = ({**{k: v for k, v in asdict(m).items() if k != "model"}, **m.model} for m in (there, wanted))
    names = [n for n in a if a[n] != b.get(n) and n not in ("label", "tokenizer_probe")]
    short = [f"{n}: {str(a[n])[:20]}, here {str(b.get(n))[:20]}" for n in names]
    return "; ".join(short) or "another tokenizer"


def _reason(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"{path}: the stored reference is damaged ({why}); run the same task with save_reference= again, which writes "
        "anew what is missing or damaged (for reference.json, or under `compare run`: delete the whole folder first)"
    )


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"save_reference={folder}: cannot be written to ({error.strerror or error}); name another folder")
