"""Where a sample's picture or clip is on this machine.

Prompt files carry paths of the machine they were made on, or paths relative to a data set's root. A path is tried as
written, then below the prompt file's own folder and every media root in the layouts users have. Users hold a
subset of the clips: a missing file is reported, never a reason to renumber the rest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ptq.errors import PtqError, UsageError
from ptq.prompts.sample import MediaRef, PromptSet, Sample

LISTED = 10

_BELOW_DATASET = re.compile(r"(?:^|/)OpenS2V-5M/(.+)$")
_FROM_PART = re.compile(r"(?:^|/)(total_part\d+/.+)$")
_PART = re.compile(r"total_part\d+")
_VBENCH_RATIO = "16-9"
"""VBench-I2V ships each image cropped to 1-1, 8-5, 7-4 and 16-9. Wan's sizes are about 16:9, so that folder is looked up;
for another ratio name its folder itself as the media root."""


def check_roots(roots: Sequence[Path]) -> tuple[Path, ...]:
    """The media roots as paths.

    Raises:
        UsageError: one of them is not a directory.
    """
    paths = tuple(Path(root) for root in roots)
    for root in paths:
        if not root.is_dir():
            raise UsageError(f"The media root {root} is not a directory.")
    return paths


def locate(media: MediaRef, prompt_file: Path, format_name: str, roots: Sequence[Path]) -> Path | None:
    """The first existing file among the places `media.path` can mean, or None."""
    found = next(filter(os.path.isfile, candidates(media.path, prompt_file, format_name, roots)), None)
    return None if found is None else Path(found)


def candidates(path: str, prompt_file: Path, format_name: str, roots: Sequence[Path]) -> Iterator[str]:
    """Places to look for `path`, in order; the first is the path as written."""
    yield os.path.join(prompt_file.parent, path)  # an absolute path replaces the folder
    tails = [] if path.startswith("/") else [path]
    tails += [match[1] for pattern in (_BELOW_DATASET, _FROM_PART) if (match := pattern.search(path))]
    if format_name == "opens2v-5m" and (part := _PART.search(prompt_file.stem)):
        tails.append(f"{part[0]}/{path}")  # paths in total_partN.json are relative to the folder total_partN
    if format_name == "vbench-i2v":
        tails.append(f"crop/{_VBENCH_RATIO}/{path}")
    for root in (prompt_file.parent, *roots):
        for tail in dict.fromkeys(tails):
            yield os.path.join(root, tail)


def require_media(prompts: PromptSet, *, skip_missing: bool = False) -> list[Sample]:
    """The samples a run that starts from images can use.

    Args:
        skip_missing: leave out the samples whose file is missing instead of refusing. Ids and seeds of the rest stay.

    Raises:
        PtqError: samples name no media at all, files are missing (listed), or nothing is left.
    """
    textual = [sample.id for sample in prompts.samples if sample.media is None]
    if textual:
        raise PtqError(
            f"{prompts.path} ({prompts.format}) names no image for {len(textual)} of {len(prompts.samples)} samples (first: {textual[0]}), but image-to-video starts from one. Use a file with images, or a text-to-video model."
        )
    missing = [one for one in prompts.samples if one.media is not None and one.media.resolved is None]
    if missing and not skip_missing:
        listed = ", ".join(f"{one.id} ({one.media.path})" for one in missing[:LISTED] if one.media is not None)
        more = f", and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        raise PtqError(
            f"{len(missing)} of {len(prompts.samples)} samples have no picture or clip here: {listed}{more}. Name the folder that holds them with --media-root, or pass --skip-missing to run the others."
        )
    present = [sample for sample in prompts.samples if sample.media is not None and sample.media.resolved is not None]
    if not present:
        raise PtqError(f"None of the {len(prompts.samples)} images that {prompts.path} names is here: nothing to run.")
    return present
