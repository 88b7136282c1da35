"""Which LoRA file goes into which expert: from the options of a command, or from what records were made with.

Reading and merging their tensors is `merge.py`'s.
"""

from __future__ import annotations

from pathlib import Path

from ptq import ui
from ptq.errors import DamagedFileError, PtqError, UsageError
from ptq.store.files import sha256_file
from ptq.store.lora import LoraInfo
from ptq.wan.layout import ModelLayout
from ptq.wan.variants import EXPERTS

OPTIONS = dict(zip(EXPERTS, ("--lora", "--lora-2"), strict=True))
"""Expert -> the option that names its LoRA."""
MAX_STRENGTH = 10.0
"""Upper limit of a strength's size; published ones are meant for 0.5 to 1.5."""


def choose_loras(layout: ModelLayout, lora: str | None, lora_2: str | None) -> dict[str, LoraInfo]:
    """Expert -> what FILE[:strength] of its option says, checked against the expert; says where one goes without.

    Args:
        lora, lora_2: for the first (or only) expert and for the second; None: none.

    Raises:
        UsageError: a packed model, an expert that it does not have, no such file, no strength.
        PtqError: a file that is no LoRA, or not of this model.
    """
    texts = {expert: text for expert, text in zip(EXPERTS, (lora, lora_2), strict=True) if text is not None}
    if not texts:
        return {}
    if layout.is_packed:
        raise UsageError(
            f"{layout.path} is a packed checkpoint: a LoRA cannot be merged into 4-bit codes. Merge it before quantizing (`ptq calibrate --lora` with the original model), or keep it beside the codes in Python: load_lora_weights of the pipeline."
        )
    for expert in texts:
        if expert not in layout.experts:
            raise UsageError(f"{layout.path} has one expert; leave out {OPTIONS[expert]}.")
    chosen = {expert: _describe(text, OPTIONS[expert]) for expert, text in texts.items()}
    from ptq.wan.merge import MergedShards  # brings torch

    for expert, info in chosen.items():
        MergedShards(layout.path / expert, info)
    for expert in layout.experts:
        if expert not in chosen:
            ui.warn(
                f"{expert} runs without a LoRA. Those for models of two experts come in two files: give the other with {OPTIONS[expert]}, unless this one is meant for one expert alone."
            )
    return chosen


def recorded_loras(directory: Path, loras: dict[str, LoraInfo]) -> dict[str, LoraInfo]:
    """What records were made with, each with the path where it lies now: the recorded one, or beside the records.

    Args:
        directory: the calibration directory. loras: as its calibration.json says.

    Raises:
        PtqError: a file is gone. DamagedFileError: it is another file now.
    """
    found = {}
    for expert, info in loras.items():
        places = [Path(info.path)] if info.path else []
        there = [place for place in (*places, directory / info.name) if place.is_file()]
        if not there:
            raise PtqError(
                f"{directory} was recorded with {info.name} merged into {expert}, and {info.path or info.name} is not there. Put the file back, or into {directory}; or record again without it."
            )
        same = [place for place in there if sha256_file(place) == info.sha256]
        if not same:
            raise DamagedFileError(
                f"{there[0]} is not the LoRA that {directory} was recorded with: its sha256 is not {info.sha256[:12]}. Put the recorded file back, or into {directory}; or record again with this one (`ptq calibrate` with another --out or --fresh)."
            )
        found[expert] = info.model_copy(update={"path": str(same[0])})
    return found


def _describe(text: str, option: str) -> LoraInfo:
    path, strength = _parse(text, option)
    if not path.is_file():
        raise UsageError(f"{option}: there is no file {path}. Give a safetensors file, or FILE:STRENGTH.")
    return LoraInfo(name=path.name, sha256=sha256_file(path), strength=strength, path=str(path.absolute()))


def _parse(text: str, option: str) -> tuple[Path, float]:
    """FILE or FILE:STRENGTH; a file whose own name ends like that is a file."""
    file, separator, number = text.rpartition(":")
    if not separator or Path(text).is_file():
        return Path(text), 1.0
    try:
        strength = float(number)
    except ValueError:
        raise UsageError(
            f"{option} takes FILE or FILE:STRENGTH, found {text!r}: there is no such file, and {number!r} is no number."
        ) from None
    if not 0 < abs(strength) <= MAX_STRENGTH:  # NaN is neither
        raise UsageError(
            f"{option}: the strength is {number}; expected a number from -{MAX_STRENGTH:g} to {MAX_STRENGTH:g} that is not 0. Without a LoRA leave the option out."
        )
    return Path(file), strength
