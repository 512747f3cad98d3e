"""From recipe text to data: strict YAML, overrides, environment variables, and mistakes in words a user can act on."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from deploy_prune.errors import RecipeError, UsageError, did_you_mean

T = TypeVar("T", bound=BaseModel)

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_LARGEST_RECIPE = 1 << 20  # bytes; a recipe is a page of text
_MOST_VALUES = 100_000


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; plain YAML would silently keep the last.

    It also reads `1e-3` as the number it looks like; YAML 1.1 wants a dot and would hand over a string.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse(path: Path) -> dict[str, Any]:
    """The mapping a recipe file holds. Raises RecipeError when it is not YAML."""
    if path.stat().st_size > _LARGEST_RECIPE:
        raise RecipeError(
            "too large for a recipe",
            where=str(path),
            expected=f"at most {_LARGEST_RECIPE} bytes",
            got=f"{path.stat().st_size} bytes",
        )
    try:
        data = _load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date that is none
        raise RecipeError("not valid YAML", where=str(path), got=" ".join(str(error).split())[:300]) from error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise RecipeError(
            "not a recipe",
            where=str(path),
            expected="a mapping with `model`, `task`, `family`",
            got=type(data).__name__,
        )
    return data


def _load(text: str) -> Any:
    """One YAML document as data. Raises yaml.YAMLError, ValueError or RecursionError."""
    loader = _StrictLoader(text)  # a SafeLoader
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _written_out(node, {}) > _MOST_VALUES:
            raise ValueError(f"more than {_MOST_VALUES} values once its aliases are written out")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node is with every alias replaced by what it names: a few lines can stand for billions."""
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1  # what it counts as inside itself
        inner = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_written_out(part, known) for part in inner)
    return known[id(node)]


def override(data: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Apply `a.b=value` settings to `data` in order; values are YAML. Returns what was wrong with them."""
    problems = []
    for setting in overrides:
        keys, equals, text = setting.partition("=")
        names = keys.strip().split(".")
        if not equals or not all(names):
            problems.append(f"--set {setting}: expected KEY=VALUE, for instance family.sparsities=[0.3,0.5]")
            continue
        try:
            value = _load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            problems.append(f"--set {setting}: the value is not valid YAML")
            continue
        place = data
        for name in names[:-1]:
            inner = place.setdefault(name, {})
            if not isinstance(inner, dict):
                problems.append(f"--set {setting}: {name} is {inner!r}, not a group of keys")
                break
            place = inner
        else:
            place[names[-1]] = value
    return problems


def shares(text: str | None, flag: str) -> list[float] | None:
    """ ".3,.5" -> [0.3, 0.5]; None stays None. Raises UsageError for what is no list of numbers."""
    try:
        return None if text is None else [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"{flag} takes numbers separated by commas", expected=".2,.4", got=text) from None


def settings_of(settings: Sequence[str], flag: str) -> dict[str, Any]:
    """`["steps=40"]` -> {"steps": 40}; values are YAML. Raises RecipeError listing every malformed one."""
    data: dict[str, Any] = {}
    problems = [problem.replace("--set", flag, 1) for problem in override(data, settings)]
    if problems:
        raise RecipeError("malformed options", problems=problems)
    return data


def expand(value: Any, unset: list[str], where: str = "") -> Any:
    """`value` with `${NAME}` in every string replaced from the environment; names that are not set go to `unset`."""
    if isinstance(value, dict):
        return {key: expand(inner, unset, f"{where}.{key}" if where else str(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [expand(inner, unset, f"{where}[{i}]") for i, inner in enumerate(value)]
    if not isinstance(value, str):
        return value
    for name in _VARIABLE.findall(value):
        if not os.environ.get(name):
            unset.append(f"{where}: {value!r} needs the environment variable {name} (or --set {where}=VALUE)")
    return _VARIABLE.sub(lambda match: os.environ.get(match[1]) or match[0], value)


def checked_options(kind: type[T], options: Mapping[str, Any], what: str) -> T:
    """`options` as `kind`. Raises UsageError that lists every unknown or impossible one of `what`."""
    try:
        return kind.model_validate(dict(options))
    except ValidationError as error:
        problems = explain(error, kind)
        raise UsageError(f"{len(problems)} bad option(s) of {what}", problems=problems) from error


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Every pydantic error as one line: where, what was expected, what was found, and the nearest known key."""
    problems = []
    for item in error.errors(include_url=False):
        where = _dotted(item["loc"])
        if item["type"] == "extra_forbidden":
            known = list(_model_at(model, item["loc"][:-1]).model_fields)
            problems.append(
                f"{where}: unknown key. {did_you_mean(str(item['loc'][-1]), known) if known else '(it takes none)'}"
            )
        elif item["type"] == "missing":
            problems.append(f"{where}: missing")
        elif item["type"] == "value_error":
            problems.append(f"{where}: {str(item['ctx']['error']) if 'ctx' in item else item['msg']}")
        else:
            expected = item["msg"].removeprefix("Input should be ")
            example = f", for example [{_short(item['input'])}]" if item["type"] == "list_type" else ""
            problems.append(f"{where}: expected {expected}{example}; got {_short(item['input'])}")
    return problems


def _dotted(location: Sequence[int | str]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "recipe"


def _model_at(model: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel]:
    """The pydantic class of the part that `location` leads to."""
    for name in location:
        annotation = model.model_fields[str(name)].annotation if str(name) in model.model_fields else None
        candidates = [
            c for c in (annotation, *get_args(annotation)) if isinstance(c, type) and issubclass(c, BaseModel)
        ]
        if not candidates:
            return model
        model = candidates[0]
    return model


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
