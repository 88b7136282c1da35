"""Reading a prompt file: one pass that detects the format, checks every record and yields samples.

`read_prompts` keeps the samples, so its memory grows with the text of the prompts (not with the file: a native
OpenS2V-5M record is 99 % annotation). `PromptScan` is the same pass without keeping anything, for looking at a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from ptq import ui
from ptq.errors import DamagedFileError, PtqError, UsageError, shown
from ptq.limits import ID_CHARS, PROMPT_RECORDS
from ptq.prompts.container import UNPAIRED, DigestingFile, iter_entries, open_digesting, sniff_container
from ptq.prompts.fields import Entry
from ptq.prompts.formats import detect_format, find_format, merge_dimensions, refuse_pairs, short_hash
from ptq.prompts.locate import check_roots, locate
from ptq.prompts.sample import MediaRef, PromptSet, Sample, caption_digest


def names_of(sample: Sample) -> set[tuple[str, str]]:
    """What makes two samples of two files the same: the id, or either caption."""
    captions = {("caption", caption_digest(text)) for text in (sample.prompt, sample.score_prompt)}
    return {("id", sample.id)} | captions


class PromptScan:
    """A prompt file whose format is known; iterate once for the samples.

    Attributes:
        path, format, dataset: as in `PromptSet`; known from the start.
        records, excluded, passed_over, sha256: complete when the iteration has ended.

    Raises:
        PtqError: no such file, empty, of no known format, or an OpenS2V cluster / cross-pair file.
        UsageError: unknown `prompt_format`, one that does not fit the file, `limit` below 1, a media root that is no
            directory.
        DamagedFileError: (while iterating) broken JSON, a record without what its format promises, an id used twice.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        prompt_format: str | None = None,
        limit: int | None = None,
        exclude: str | Path | None = None,
        media_root: Sequence[Path] = (),
        skip_missing: bool = False,
    ) -> None:
        if limit is not None and limit < 1:
            raise UsageError(f"At least one prompt must be read, but the limit is {limit}.")
        self.path = Path(path)
        self.dataset = self.path.stem
        self._limit, self._roots, self._skip_missing = limit, check_roots(media_root), skip_missing
        self._container = sniff_container(self.path, plain=prompt_format == "txt")
        name, value = self._first_entry()
        refuse_pairs(self.path, self._container, name, value)
        if prompt_format is None:
            self._format = detect_format(self.path, self._container, name, value)
        else:
            self._format = find_format(self.path, self._container, prompt_format)
        self.format = self._format.name
        self._known = (
            {name for sample in PromptScan(exclude) for name in names_of(sample)} if exclude is not None else set()
        )
        self.records, self.excluded, self.passed_over, self.sha256 = 0, 0, 0, ""

    def __iter__(self) -> Iterator[Sample]:
        self.records = self.excluded = self.passed_over = 0
        with open_digesting(self.path) as source:
            samples = self._samples(source)
            if self.format.startswith("vbench"):
                samples = merge_dimensions(self.path, samples)
            else:
                samples = self._unique(samples)
            yield from islice(self._finish(samples), self._limit)
            self.sha256 = source.finish()

    def _first_entry(self) -> tuple[str, Any]:
        with DigestingFile(self.path) as source:
            first = next(iter_entries(self.path, self._container, source), None)
        if first is None:
            raise PtqError(f"The prompt file {self.path} holds no records: expected at least one prompt.")
        return first

    def _samples(self, source: DigestingFile) -> Iterator[Sample]:
        for name, value in iter_entries(self.path, self._container, source):
            self.records += 1
            entry = Entry(self.path, name, value)
            plain = self._container == "text" or (self.format == "generic" and isinstance(value, str))
            if not plain and not isinstance(value, dict):
                raise DamagedFileError(
                    f"{self.path}, record {name}: expected an object, found {type(value).__name__}. Correct or remove it."
                )
            if self.records > PROMPT_RECORDS:
                raise DamagedFileError(f"{self.path} has more than {PROMPT_RECORDS} records. Split it.")
            yield self._parse(entry)

    def _parse(self, entry: Entry) -> Sample:
        sample = self._format.parse(entry, self.dataset)
        if UNPAIRED in sample.id or len(sample.id) > ID_CHARS:
            raise DamagedFileError(
                f"{self.path}, record {ui.shorten(entry.name)}: its id {shown(sample.id)} is longer than {ID_CHARS} characters or has half of a surrogate pair. Give it another id."
            )
        return sample

    def _unique(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        # Hashes, not the ids: a scan of millions of records stays small. A hit is confirmed by a second look.
        seen: set[int] = set()
        for sample in samples:
            fingerprint = hash(sample.id)
            if fingerprint in seen:
                self._refuse_repeated(sample.id, self.records)
            seen.add(fingerprint)
            yield sample

    def _refuse_repeated(self, identity: str, number: int) -> None:
        """Raise for an id that record `number` (from 1) repeats; return where only the hashes were equal."""
        names = []
        with DigestingFile(self.path) as source:
            for name, value in islice(iter_entries(self.path, self._container, source), number):
                if self._parse(Entry(self.path, name, value)).id == identity:
                    names.append(name)
        if len(names) < 2:
            return
        what = f"the same prompt (id {identity})" if self.format == "txt" else f"the same id {shown(identity)}"
        raise DamagedFileError(
            f"{self.path}: records {names[0]} and {names[1]} have {what}. Ids name the videos and decide the seeds, so each must be unique: remove one record or give it another id."
        )

    def _finish(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        for sample in samples:
            if self._known & names_of(sample):
                self.excluded += 1
                continue
            if sample.media is not None:
                found = locate(sample.media, self.path, self.format, self._roots)
                if found is None and self._skip_missing:
                    self.passed_over += 1
                    continue
                sample = replace(sample, media=replace(sample.media, resolved=found))
            yield sample


def read_prompts(
    path: str | Path,
    *,
    prompt_format: str | None = None,
    limit: int | None = None,
    exclude: str | Path | None = None,
    media_root: Sequence[Path] = (),
    skip_missing: bool = False,
) -> PromptSet:
    """Read a prompt file.

    Args:
        prompt_format: one of `FORMAT_NAMES`; None detects it.
        limit: keep the first `limit` samples (counted after `exclude` and `skip_missing`); the records behind them are not
            checked.
        exclude: another prompt file, of any format; samples it has too, by id or by caption, are left out.
        media_root: folders below which pictures and clips are looked for, in order.
        skip_missing: pass over samples whose picture or clip is not here; a message says how many there were.

    Raises:
        PtqError, UsageError, DamagedFileError: as `PromptScan`; also when `exclude` or `skip_missing` leaves nothing.
    """
    scan = PromptScan(
        path,
        prompt_format=prompt_format,
        limit=limit,
        exclude=exclude,
        media_root=media_root,
        skip_missing=skip_missing,
    )
    samples = list(scan)
    if scan.passed_over and not samples:
        raise PtqError(f"None of the {scan.passed_over} images that {scan.path} names is here: nothing to run.")
    if scan.passed_over:
        ui.info(
            f"{scan.path.name}: {scan.passed_over} prompts were passed over, because their picture or clip is not here; {len(samples)} can run."
        )
    if not samples:
        raise PtqError(f"All {scan.records} prompts of {scan.path} are also in {exclude}: nothing is left to run.")
    return PromptSet(scan.path, scan.format, scan.sha256, scan.dataset, samples, scan.records, scan.excluded)


def make_sample(prompt: str, image: Path | None = None) -> Sample:
    """The sample of a single prompt that is in no file; its id is the start of the prompt's SHA-1, as in a .txt file.

    Raises:
        UsageError: an empty prompt, or no such image.
    """
    if not prompt.strip():
        raise UsageError("--prompt is empty.")
    if image is not None and not image.is_file():
        raise UsageError(f"The image {image} does not exist.")
    media = MediaRef("image", str(image), resolved=image) if image is not None else None
    return Sample("prompt", short_hash(prompt), prompt, prompt, media)
