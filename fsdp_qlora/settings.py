"""Frozen dataclasses as settings: their documentation, and values read from YAML files and command-line strings."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from fsdp_qlora.errors import ConfigError

T = TypeVar("T")
Scalar = str | int | float | bool | None

_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_EXPECTED = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a single value, not empty"}


@dataclass(frozen=True)
class Setting:
    """One field of a settings dataclass, with everything that help pages and tables show of it."""

    name: str
    section: str
    doc: str
    kind: type
    choices: tuple[str, ...]
    optional: bool
    required: bool
    default: Scalar


@dataclass(frozen=True)
class Rule:
    """A condition on the value of one setting, and its wording ('must be ...')."""

    holds: Callable[[Any], bool]
    wording: str


@dataclass(frozen=True)
class Check:
    """A condition on several settings: gives the problem as text, or None; runs only if each of them is valid."""

    names: tuple[str, ...]
    problem: Callable[[Any], str | None]


@functools.cache
def describe(cls: type) -> tuple[Setting, ...]:
    """Return the settings of a dataclass in their order, with the docs and '# --- section ---' lines of its source."""
    written: dict[str, tuple[str, str]] = {}
    for part in reversed(cls.__mro__[:-1]):
        written |= _read_source(part)
    hints = get_type_hints(cls)
    found = []
    for field in dataclasses.fields(cls):
        kind, choices, optional = _type_of(hints[field.name])
        section, doc = written[field.name]
        required = field.default is dataclasses.MISSING
        default: Any = None if required else field.default
        found.append(Setting(field.name, section, doc, kind, choices, optional, required, default))
    return tuple(found)


def _read_source(cls: type) -> dict[str, tuple[str, str]]:
    """Return section and documentation of the fields that a class itself defines."""
    source = textwrap.dedent(inspect.getsource(cls))
    body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
    docs: dict[str, str] = {}
    lines: dict[str, int] = {}
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        lines[statement.target.id] = statement.lineno
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    headings = [
        (number, match[1])
        for number, line in enumerate(source.splitlines(), start=1)
        if (match := re.fullmatch(r"\s*# --- (.+) ---\s*", line))
    ]
    sections = {
        name: next((title for line, title in reversed(headings) if line < number), "") for name, number in lines.items()
    }
    return {name: (sections[name], docs[name]) for name in lines}


def show(value: Scalar) -> str:
    """Return a value the way it is written on the command line."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def parse(
    cls: type[T],
    overrides: Mapping[str, object],
    config_file: str | None,
    rules: Mapping[str, Rule],
    checks: Iterable[Check],
    other_names: Mapping[str, str] = MappingProxyType({}),
) -> T:
    """Make settings from defaults, then a YAML file, then overrides ('-' and '_' are the same in names).

    Args:
        other_names: settings by what else they are called elsewhere, for hints on unknown names.

    Raises:
        ConfigError: one line for every unknown name, wrong type, broken rule and impossible combination.
    """
    kind: type = cls
    known = {setting.name: setting for setting in describe(kind)}
    from_file, problems = _read_yaml(config_file) if config_file else ({}, [])
    given: list[tuple[str, str, object]] = [(f"{config_file}: {key}", key, raw) for key, raw in from_file.items()]
    given += [(f"--{key}", key, raw) for key, raw in overrides.items()]
    values: dict[str, Any] = {name: setting.default for name, setting in known.items()}
    faults: dict[str, str] = {}
    for label, key, raw in given:
        name = key.replace("-", "_")
        if name not in known:
            prefix, meant = "--" if label == f"--{key}" else "", other_names.get(name)
            hint = (
                f"did you mean {prefix}{meant}?"
                if meant in known
                else _suggest(name, list(known), prefix, "see --help")
            )
            faults[name] = f"{label}: unknown setting; {hint}"
            continue
        faults.pop(name, None)
        try:
            values[name] = _coerce(known[name], raw)
            if name in rules and values[name] is not None and not rules[name].holds(values[name]):
                raise ValueError(f"must be {rules[name].wording}")
        except ValueError as error:
            hint = "" if known[name].required else f" (default: {show(known[name].default)})"
            faults[name] = f"{label}={_shorten(raw)}: {error}{hint}"
    absent = known.keys() - {key.replace("-", "_") for _, key, _ in given}
    for setting in known.values():
        if setting.required and setting.name in absent:
            faults[setting.name] = f"--{setting.name} is required; {setting.doc[0].lower()}{setting.doc[1:]}"
    config = cls(**values)
    found = [check.problem(config) for check in checks if not faults.keys() & set(check.names)]
    problems += [*faults.values(), *(problem for problem in found if problem)]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def suggest(word: str, known: Sequence[str], otherwise: str) -> str:
    """Return 'did you mean X?' for the nearest known word, or the given text."""
    return _suggest(word, known, "", otherwise)


def _suggest(word: str, known: Sequence[str], prefix: str, otherwise: str) -> str:
    nearest = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {prefix}{nearest[0]}?" if nearest else otherwise


def _shorten(value: object) -> str:
    """Return a value on one line of bounded length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _type_of(hint: object) -> tuple[type, tuple[str, ...], bool]:
    """Return kind, choices and whether None is allowed for one of the supported annotations."""
    members = [member for member in get_args(hint) if member is not NoneType]
    optional = NoneType in get_args(hint)
    if get_origin(hint) is Literal:
        return str, tuple(members), False
    kind = members[0] if optional else hint
    assert isinstance(kind, type), f"unsupported annotation {hint}"
    return kind, (), optional


def _coerce(setting: Setting, value: object) -> Scalar:
    """Return the value in the setting's type; strings are read by that type, never guessed.

    Raises:
        ValueError: what the value must be.
    """
    if setting.optional and (value is None or str(value).lower() in ("none", "null", "")):
        return None
    if value is None or not isinstance(value, str | int | float | Path) or not (raw := str(value)).strip():
        raise ValueError(f"must be {_EXPECTED[setting.kind]}")
    if setting.choices:
        if raw not in setting.choices:
            raise ValueError(f"must be one of {', '.join(setting.choices)}")
        return raw
    if setting.kind is str:
        return raw
    if setting.kind is bool:
        if raw.lower() not in _BOOLS:
            raise ValueError(f"must be {_EXPECTED[bool]}")
        return _BOOLS[raw.lower()]
    return _number(setting.kind, raw)


def _number(kind: type, raw: str) -> int | float:
    try:
        return int(raw) if kind is int else _finite(raw)
    except ValueError:
        pass
    try:
        number = _finite(raw)
    except ValueError as error:
        raise ValueError(f"must be {_EXPECTED[kind]}") from error
    if not number.is_integer():  # only whole numbers arrive here: '1e3' and '3.0' are whole, '2.5' is not
        raise ValueError(f"must be {_EXPECTED[kind]}")
    return int(number)


def _finite(raw: str) -> float:
    number = float(raw)
    if not math.isfinite(number):
        raise ValueError
    return number


def _read_yaml(path: str) -> tuple[dict[str, str], list[str]]:
    """Return the values of a flat YAML file as written (1e-4 and no stay text until typed), and its problems."""
    try:
        root = yaml.compose(Path(path).expanduser().read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        return {}, [f"--config={path}: cannot be read ({error.strerror}); check the path"]
    except UnicodeDecodeError:
        return {}, [f"--config={path}: is not UTF-8 text; write 'name: value' lines"]
    except yaml.YAMLError as error:
        return {}, [f"--config={path}: is not YAML ({' '.join(str(error).split())}); write 'name: value' lines"]
    if root is None:  # an empty file, or one with comments only
        return {}, []
    if not isinstance(root, yaml.MappingNode):
        return {}, [f"--config={path}: is not a mapping; write 'name: value' lines"]
    pairs: dict[str, str] = {}
    problems = []
    for key, value in root.value:
        where = f"{path}: line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode) or not isinstance(value, yaml.ScalarNode):
            problems.append(f"{where}: nested value; write one 'name: value' line for each setting")
        elif (name := key.value.replace("-", "_")) in pairs:
            problems.append(f"{where}: {key.value} is set twice; keep one of the lines")
        else:
            pairs[name] = value.value
    return pairs, problems
