"""The prompt-file formats: how each is recognised and how one of its entries becomes a sample.

`FORMATS` is in order of precedence: detection takes the first whose container and first entry fit, and refuses what
none fits. An entry that does not have what its format promises is an error that names it, never skipped. Media paths
are copied as written; `locate.py` finds the files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ptq import ui
from ptq.errors import DamagedFileError, PtqError, UsageError, shown
from ptq.prompts.container import CONTAINER_TEXT, Container
from ptq.prompts.fields import Entry
from ptq.prompts.sample import MediaRef, Sample

NATIVE_CAPTIONS = ("face_cap_glm", "face_cap_Aria", "face_cap_qwen")
"""Captions of a native OpenS2V-5M entry, best first; the last resort is metadata.cap[0]."""

PROMPT_KEYS = ("prompt", "caption", "text")
ID_KEYS = ("id", "name")
SHORT_HASH = 12


@dataclass(frozen=True)
class PromptFormat:
    """One file format: the containers it comes in, the test on an entry, and entry -> sample."""

    name: str
    containers: tuple[Container, ...]
    matches: Callable[[Any], bool]
    parse: Callable[[Entry, str], Sample]


def detect_format(path: Path, container: Container, name: str, value: Any) -> PromptFormat:
    """The format of a file from its container and first entry.

    Raises:
        PtqError: a shape no format has.
    """
    for candidate in FORMATS:
        if container in candidate.containers and candidate.matches(value):
            return candidate
    if isinstance(value, dict):
        found = f"with the keys {', '.join(shown(key) for key in sorted(map(str, value))[:8]) or '(none)'}"
    else:
        found = f"of type {type(value).__name__}"
    raise PtqError(
        f"{path} is {CONTAINER_TEXT[container]} whose first record ({ui.shorten(name)}) is {found}; no known prompt format looks like that. Known: {', '.join(FORMAT_NAMES)}. Write a list or JSON lines of objects with a 'prompt', CSV with a column of that name, or one prompt a line in a .txt file, or name the format with --prompt-format."
    )


def find_format(path: Path, container: Container, name: str) -> PromptFormat:
    """The format a user named, refused where the file's container cannot hold it.

    Raises:
        UsageError: no such format, or the wrong container.
    """
    for candidate in FORMATS:
        if candidate.name == name:
            if container not in candidate.containers:
                expected = " or ".join(CONTAINER_TEXT[one] for one in candidate.containers)
                raise UsageError(f"{path} is {CONTAINER_TEXT[container]}, but a prompt file {name} is {expected}.")
            return candidate
    raise UsageError(f"There is no prompt format {name!r}. Known: {', '.join(FORMAT_NAMES)}.")


def refuse_pairs(path: Path, container: Container, name: str, value: Any) -> None:
    """Refuse the OpenS2V files that list which clips belong together: they hold no prompts.

    Raises:
        PtqError: the file is an object of lists, or its records have a `cur_id`.
    """
    first = value[0] if isinstance(value, list) and value else value
    if (container == "map" and isinstance(value, list)) or (isinstance(first, dict) and "cur_id" in first):
        raise PtqError(
            f"{path} looks like an OpenS2V cluster or cross-pair file (record {ui.shorten(name)} is a list of clips or has a 'cur_id'). It says which clips show the same subject and holds no prompts. Use the matching total_partN.json or OpenS2V-5M_to_mm.json."
        )


def merge_dimensions(path: Path, samples: Iterable[Sample]) -> Iterator[Sample]:
    """VBench lists a prompt once for each group of dimensions: one sample a prompt, with all its dimensions.

    Raises:
        DamagedFileError: two entries give one prompt different images.
    """
    merged: dict[str, Sample] = {}
    for sample in samples:
        known = merged.setdefault(sample.id, sample)
        if known is sample:
            continue
        if known.media != sample.media:
            raise DamagedFileError(f"{path}: the prompt {shown(sample.prompt)} appears twice, with different images.")
        dimensions = known.extra["dimension"]
        added = [one for one in sample.extra["dimension"] if one not in dimensions]
        merged[sample.id] = replace(known, extra={"dimension": dimensions + added})
    yield from merged.values()


def _sample(dataset: str, identity: str, prompt: str, media: MediaRef | None = None, **extra: Any) -> Sample:
    return Sample(dataset, identity, prompt, prompt, media, extra)


def _has(*keys: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(key in value for key in keys)


def _key(entry: Entry) -> str:
    return entry.name[1:-1]  # names of records in a JSON object are their keys in quotation marks


def _parse_mm(entry: Entry, dataset: str) -> Sample:
    path = entry.text("path")
    return _sample(dataset, _stem(entry, "path", path), entry.text_or_first("cap"), MediaRef("video", path))


def _parse_eval(entry: Entry, dataset: str) -> Sample:
    images = entry.texts("img_paths")
    # Keys repeat across the three domain files with different images, so the domain is part of the id.
    identity = f"{dataset.removesuffix('_Eval')}/{_key(entry)}"
    policy = {"references": len(images), "reference_policy": "first_reference"}
    return _sample(dataset, identity, entry.text("prompt"), MediaRef("image", images[0]), **policy)


def _is_native(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("metadata"), dict) and "path" in value["metadata"]


def _parse_native(entry: Entry, dataset: str) -> Sample:
    # An absent, null or empty caption falls through to the next; the key that was used is recorded.
    caption = next((key for key in NATIVE_CAPTIONS if entry.get(f"metadata.{key}")), "cap")
    prompt = entry.text_or_first("metadata.cap") if caption == "cap" else entry.text(f"metadata.{caption}")
    x0, x1, y0, y1 = entry.integers("metadata.crop", 4)
    if x0 >= x1 or y0 >= y1:
        entry.fail("metadata.crop", "[x0, x1, y0, y1] with x0 < x1 and y0 < y1")
    frame = entry.integers("metadata.face_cut", 2)[0]
    media = MediaRef("crop", entry.text("metadata.path"), frame, (x0, x1, y0, y1))
    return _sample(dataset, _key(entry), prompt, media, caption=caption)


def _parse_vbench(entry: Entry, dataset: str) -> Sample:
    prompt = entry.text("prompt_en")
    return _sample(dataset, prompt, prompt, dimension=entry.texts("dimension"))


def _parse_vbench_i2v(entry: Entry, dataset: str) -> Sample:
    return replace(_parse_vbench(entry, dataset), media=MediaRef("image", entry.text("image_name")))


def _is_generic(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and any(key in value for key in PROMPT_KEYS))


def _parse_generic(entry: Entry, dataset: str) -> Sample:
    if isinstance(entry.value, str):
        entry = replace(entry, value={PROMPT_KEYS[0]: entry.value})
    prompt = entry.text(next((key for key in PROMPT_KEYS if entry.get(key) is not None), PROMPT_KEYS[0]))
    score_prompt = entry.text("score_prompt") if entry.get("score_prompt") is not None else prompt
    media = None
    if entry.get("image") is not None:
        media = MediaRef("image", entry.text("image"))
    elif entry.get("video") is not None:
        media = MediaRef("video", entry.text("video"))
    return Sample(dataset, _generic_id(entry, prompt, media), prompt, score_prompt, media)


def _generic_id(entry: Entry, prompt: str, media: MediaRef | None) -> str:
    """`id`, `name`, the stem of the image or clip, or the start of the prompt's SHA-1: the first there is."""
    for key in ID_KEYS:
        value = entry.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if value is not None:
            return entry.text(key)
    return _stem(entry, media.kind, media.path) if media is not None else short_hash(prompt)


def _parse_text(entry: Entry, dataset: str) -> Sample:
    return _sample(dataset, short_hash(entry.value), entry.value)


def _stem(entry: Entry, key: str, path: str) -> str:
    stem = PurePosixPath(path).stem
    return stem if stem else entry.fail(key, "a path that ends in a file name")


def short_hash(text: str) -> str:
    """The id of a prompt that has no other: the start of its SHA-1."""
    return hashlib.sha1(text.encode("utf-8"), usedforsecurity=False).hexdigest()[:SHORT_HASH]


FORMATS = (
    PromptFormat("opens2v-mm", ("list",), _has("path", "cap"), _parse_mm),
    PromptFormat("opens2v-eval", ("map",), _has("img_paths", "prompt"), _parse_eval),
    PromptFormat("opens2v-5m", ("map",), _is_native, _parse_native),
    PromptFormat("vbench-i2v", ("list",), _has("prompt_en", "dimension", "image_name"), _parse_vbench_i2v),
    PromptFormat("vbench", ("list",), _has("prompt_en", "dimension"), _parse_vbench),
    PromptFormat("generic", ("list", "wrapped", "lines", "csv"), _is_generic, _parse_generic),
    PromptFormat("txt", ("text",), lambda value: isinstance(value, str), _parse_text),
)
FORMAT_NAMES = tuple(one.name for one in FORMATS)
