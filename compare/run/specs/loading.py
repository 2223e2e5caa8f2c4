"""Reads spec files, JSON or YAML, and reports mistakes with file, entry, field and the nearest valid name."""

from __future__ import annotations

import difflib
import glob
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from compare.errors import CompareError, os_reason
from compare.run.specs.schema import DataSpec, GuideModel, HarnessModel
from compare.text import and_more, shorten

_MOST_NODES, _DEEPEST = 100_000, 200  # limits of a YAML document: values, and brackets open at once


@dataclass(frozen=True)
class Entry:
    """A model's entry and its place in a spec file; paths in it count from the folder of `file`."""

    spec: GuideModel | HarnessModel
    file: Path
    number: int

    @property
    def source(self) -> str:
        return f"{self.file}: entry {self.number}"


def load_models(patterns: Sequence[str]) -> tuple[list[Entry], list[str]]:
    """The valid entries of all files that `patterns` (names and globs) stand for, and the mistakes in the others.

    A data spec among several files is skipped: ``specs/*.json`` may match both kinds. Raises CompareError where a file
    cannot be read as a list of models at all.
    """
    entries: list[Entry] = []
    problems: list[str] = []
    files = _expand(patterns)
    for file in files:
        content = _parse(file)
        if len(files) > 1 and _is_data_spec(content):
            continue
        for number, raw in enumerate(_model_list(content, file), 1):
            where = f"{file}: entry {number}{_label_of(raw)}"
            schema = _form_of(raw)
            if schema is None:
                problems.append(f'{where}: expected "load_fn" and "model_dir" (or "model" and "args"){_near_form(raw)}')
                continue
            try:
                entries.append(Entry(schema.model_validate(raw), file, number))
            except ValidationError as error:
                problems.extend(f"{where}: {problem}" for problem in _explain(error, schema))
    if not entries and not problems:
        raise CompareError(f"-m {' '.join(patterns)}: these are data specs (for -d); no file lists models")
    return entries, problems


def load_data(file: Path) -> DataSpec:
    """The data spec in `file`. Raises CompareError that names the file and its wrong fields."""
    raw = _parse(file)
    if isinstance(raw, dict) and isinstance(raw.get("data"), dict):
        raw = raw["data"]
    if not isinstance(raw, dict):
        raise CompareError(f'{file}: expected one data spec, an object such as {{"dataset": "wiki2", …}}')
    try:
        return DataSpec.model_validate(raw)
    except ValidationError as error:
        raise CompareError(f"{file}: {'; '.join(_explain(error, DataSpec))}") from None


def _expand(patterns: Iterable[str]) -> list[Path]:
    """Files in the order given, each once; the matches of a glob in order of their names."""
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.exists():
            matches = [path]
        elif glob.has_magic(pattern):
            matches = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207  (may be absolute)
            if not matches:
                raise CompareError(f"-m {pattern}: no file matches")
        else:
            raise CompareError(f"-m {pattern}: no such file{_did_you_mean(path.name, _siblings(path))}")
        files.update(dict.fromkeys(matches))
    return list(files)


def _siblings(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []


def _is_data_spec(raw: Any) -> bool:
    return isinstance(raw, dict) and "models" not in raw and not {"dataset", "tokenize_fn", "eval_len"}.isdisjoint(raw)


def _model_list(raw: Any, file: Path) -> list[Any]:
    if isinstance(raw, dict) and isinstance(raw.get("models"), list):
        raw = raw["models"]
    if isinstance(raw, dict) and _form_of(raw):
        raw = [raw]
    if not isinstance(raw, list):
        hint = " (this is a data spec: give it to -d)" if _is_data_spec(raw) else ""
        raise CompareError(f"{file}: expected a list of models{hint}")
    if not raw:
        raise CompareError(f"{file}: holds no model")
    return raw


def _parse(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise CompareError(f"{file}: is not text (not UTF-8)") from None
    except OSError as error:
        raise CompareError(f"{file}: cannot be read ({os_reason(error)})") from None
    if file.suffix.lower() in (".yaml", ".yml"):
        import yaml

        if _depth(text) > _DEEPEST:  # PyYAML would take minutes to fail
            raise CompareError(f"{file}: is nested too deeply for a spec")
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
            problem = getattr(error, "problem", None) or " ".join(str(error).split())
            raise CompareError(f"{file}: is not YAML ({at}{problem})") from None
        except RecursionError:
            raise CompareError(f"{file}: is nested too deeply for a spec") from None
        except ValueError as error:  # has the form of a date or number, but does not exist: 2001-99-99
            raise CompareError(f"{file}: is not YAML ({error}; quote it if it is text)") from None
        if not _is_small(content):
            raise CompareError(f"{file}: its aliases (*NAME) unfold to more than a spec can hold")
        return content
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CompareError(f"{file}: is not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except RecursionError:
        raise CompareError(f"{file}: is nested too deeply for a spec") from None
    except ValueError as error:
        raise CompareError(f"{file}: is not usable JSON ({error})") from None


def _depth(text: str) -> int:
    """The deepest nesting of brackets. Brackets in quotes count too, but are too few to matter."""
    depth = deepest = 0
    for bracket in re.findall(r"[][{}]", text):
        depth = depth + 1 if bracket in "[{" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return deepest


def _is_small(content: Any) -> bool:
    """Whether a document with its aliases expanded has at most `_MOST_NODES` values; a few lines can mean billions."""
    pending, count = [content], 0
    while pending and count <= _MOST_NODES:
        node = pending.pop()
        count += 1
        if isinstance(node, dict):
            pending += [*node, *node.values()]
        elif isinstance(node, (list, tuple, set)):
            pending += node
    return count <= _MOST_NODES


def _form_of(raw: Any) -> type[GuideModel] | type[HarnessModel] | None:
    """The schema of an entry, by the fields it has; None where it has neither's."""
    if not isinstance(raw, dict):
        return None
    if "load_fn" in raw or "model_dir" in raw:
        return GuideModel
    return HarnessModel if "model" in raw else None


def _near_form(raw: Any) -> str:
    if not isinstance(raw, dict):
        return f", found {type(raw).__name__}"
    return next((hint for key in raw if (hint := _did_you_mean(str(key), ["load_fn", "model_dir", "model"]))), "")


def _label_of(raw: Any) -> str:
    label = raw.get("label") if isinstance(raw, dict) else None
    return f" ({_brief(label)})" if isinstance(label, str) else ""


def _did_you_mean(name: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _explain(error: ValidationError, schema: type[BaseModel]) -> list[str]:
    """One line per mistake, in pydantic's own words where they are clear."""
    lines: dict[str, None] = {}
    reported: set[str] = set()
    for problem in error.errors(include_url=False):
        parts = [str(part) for part in problem["loc"]]
        place = [part for part in parts if not part.startswith(("constrained-", "list[", "function-"))]
        name = shorten(".".join(place), 80)
        if name and name in reported:  # pydantic lists each alternative type of a field
            continue
        reported.add(name)
        if problem["type"] == "extra_forbidden":
            valid = _fields_of(schema, place[:-1])
            guess = _did_you_mean(place[-1], valid) or f"; known: {', '.join(valid)}"
            lines[f'field "{name}" is unknown{guess}'] = None
        elif problem["type"] == "literal_error":
            choices = [c.strip("' ") for c in str(problem["ctx"]["expected"]).replace(" or ", ", ").split(",")]
            guess = _did_you_mean(str(problem["input"]), choices)
            lines[f'field "{name}": {_brief(problem["input"])} is unknown{guess} (one of {and_more(choices, 12)})'] = (
                None
            )
        elif problem["type"] == "missing":
            lines[f'field "{name}" is missing'] = None
        elif problem["type"] == "value_error":
            lines[str(problem["ctx"]["error"])] = None
        else:
            lines[f'field "{name}": {problem["msg"].lower()}, found {_brief(problem["input"])}'] = None
    return list(lines)


def _brief(value: Any) -> str:
    return shorten(repr(value), 80)


def _fields_of(schema: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The valid names, aliases included, in the part of `schema` that `path` leads to."""
    for part in path:
        field = schema.model_fields.get(part)
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        schema = inner
    names: list[str] = []
    for name, field in schema.model_fields.items():
        names.append(name)
        if field.alias:
            names.append(field.alias)
    return names
