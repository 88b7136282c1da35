"""Reading YAML into strict pydantic models, with errors a person can act on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ptq.errors import UsageError, shown
from ptq.limits import YAML_BYTES, YAML_DEPTH

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
_SHOWN_PROBLEMS, _SHOWN_NAME = 4, 80

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML of bounded depth, without aliases (a few lines of them stand for gigabytes) and without keys given twice."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self._refuse("aliases (*name) are not read here: write the value out", event)
        if self._depth == YAML_DEPTH:
            self._refuse(f"groups are nested more than {YAML_DEPTH} deep", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        repeated = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        if repeated is not None:
            self._refuse(f"the key {shown(repeated[1])} occurs twice in one group", node)
        return super().construct_mapping(node, deep)

    @staticmethod
    def _refuse(problem: str, place: Any) -> None:
        raise yaml.constructor.ConstructorError(None, None, problem, place.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)  # 1e-3 is a number, as in YAML 1.2; YAML 1.1 wants 1.0e-3


def parse_yaml(text: str) -> Any:
    """The value of a YAML text of others.

    Raises:
        ValueError: not YAML, or more or other than is read here; one line that says what and where.
    """
    if len(text) > YAML_BYTES:
        raise ValueError(f"it is longer than {YAML_BYTES >> 10} KiB")
    try:
        value = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{_cut(str(error.problem or error.context), 200)}{place}") from error
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, AttributeError) as error:
        raise ValueError(_cut(" ".join(str(error).split()), 200)) from error
    _refuse_halves(value)
    return value


def _refuse_halves(value: Any) -> None:
    """Texts with half of a surrogate pair could be written to no file."""
    if isinstance(value, dict | list):
        for one in (*value, *value.values()) if isinstance(value, dict) else value:
            _refuse_halves(one)
    elif isinstance(value, str):
        value.encode("utf-8")


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file holding one mapping.

    Raises:
        UsageError: unreadable, not YAML, too large or deep, or not a mapping.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UsageError(f"Could not read {path}: it is not a file.")
    try:
        with open(path, encoding="utf-8-sig") as handle:
            value = parse_yaml(handle.read(YAML_BYTES + 1))
    except OSError as error:
        raise UsageError(f"Could not read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"{path} is not valid YAML: {error}.") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} should hold a mapping of settings, found {type(value).__name__}.")
    return value


def validate(model: type[Model], value: dict[str, Any], where: str, given: Collection[str] = ()) -> Model:
    """Validate `value`, turning pydantic's report into one sentence.

    Args:
        where: what the values are from; given: dotted keys that `--set` put there.

    Raises:
        UsageError: names every offending key, where it is from, what was found and what is allowed.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        problems = [_problem(model, one, where, given) for one in found[:_SHOWN_PROBLEMS]]
        keys = ", ".join(_keys_beside(model, found[0]["loc"]))
        raise UsageError(f"{'; '.join(problems)}. Known keys: {keys}.") from error


def _problem(model: type[BaseModel], error: ErrorDetails, where: str, given: Collection[str]) -> str:
    """`Recipe mine: solver.damping: should be a valid number (found 'x')`, or with `--set` in the place of the recipe."""
    key = ".".join(map(str, error["loc"]))
    chosen = any(key == one or key.startswith(f"{one}.") or one.startswith(f"{key}.") for one in given)
    place = f"{'--set' if chosen else where + ':'} {_cut(key, _SHOWN_NAME) or 'the whole'}"
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(error["loc"][-1]), _keys_beside(model, error["loc"]), n=2)
        return f"{place}: there is no such key{' (did you mean ' * bool(close)}{' or '.join(close)}{'?)' * bool(close)}"
    words = error["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    return f"{place}: {_cut(words, 300)} (found {shown(error['input'])})"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."


def _keys_beside(model: type[BaseModel], where: tuple[int | str, ...]) -> list[str]:
    """Keys of the group that holds the offending one."""
    for part in where[:-1]:
        field = model.model_fields.get(str(part))
        annotation = None if field is None else field.annotation
        groups = [one for one in (annotation, *get_args(annotation)) if isinstance(one, type)]
        inner = next((one for one in groups if issubclass(one, BaseModel)), None)
        if inner is None:
            break
        model = inner
    return list(model.model_fields)


def list_configs(kind: str) -> list[str]:
    """Names of the files installed under configs/<kind>, without ending."""
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml"))
