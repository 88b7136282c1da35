"""Reading YAML into strict pydantic models, with errors a person can act on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ptq.errors import UsageError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

Model = TypeVar("Model", bound=BaseModel)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file holding one mapping.

    Raises:
        UsageError: unreadable, not YAML, or not a mapping.
    """
    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"Could not read {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} should hold a mapping of settings, found {type(value).__name__}.")
    return value


def validate(model: type[Model], value: dict[str, Any], where: str) -> Model:
    """Validate `value`, turning pydantic's report into one sentence.

    Raises:
        UsageError: names every offending key, what was found and what is allowed.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'the whole'}: {e['msg']} (found {e['input']!r})" for e in error.errors()
        )
        raise UsageError(
            f"{where}: {problems}. Known keys: {', '.join(_keys_beside(model, error.errors()[0]['loc']))}."
        ) from error


def _keys_beside(model: type[BaseModel], where: tuple[int | str, ...]) -> list[str]:
    """Keys of the group that holds the offending one."""
    for part in where[:-1]:
        field = model.model_fields.get(str(part))
        inner = None if field is None else field.annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        model = inner
    return list(model.model_fields)


def list_configs(kind: str) -> list[str]:
    """Names of the files installed under configs/<kind>, without ending."""
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml"))
