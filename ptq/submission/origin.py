"""Whether reference run and checkpoint are of one original model: what can be told where that is an embedded one.

Of any other model the archive has no more than a digest.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain
from pathlib import Path

from ptq.checkpoint.shards import ShardSet
from ptq.errors import DamagedFileError
from ptq.store.files import files_below, sha256_file
from ptq.submission.check import NotCheckedError
from ptq.submission.contents import Contents
from ptq.tiny import embedded
from ptq.wan.identity import ModelIdentity, base_model_identity, identify_model
from ptq.wan.layout import read_layout
from ptq.wan.loading import OUTLIERS
from ptq.wan.outliers import outlier_directory

INDEX = "model_index.json"


def embedded_original(contents: Contents) -> tuple[Path, ModelIdentity] | None:
    """The embedded model that the reference run was made with, or None."""
    wanted = contents.infos["reference"].checkpoint.digest
    # What it claims to be: only with that name are outliers planted, to compare.
    named = contents.infos["reference"].model
    planted = (outlier_directory(directory) for directory in embedded() if named == directory.name + OUTLIERS)
    found = ((directory, identify_model(directory.name, directory)) for directory in chain(embedded(), planted))
    return next(((directory, one) for directory, one in found if one.digest == wanted), None)


def check_original(contents: Contents) -> str:
    """The reference run is of an embedded model, the checkpoint was made from that one, and only its experts are others.

    Raises:
        DamagedFileError: the manifest names another original, or a component besides the experts is not the original's.
        NotCheckedError: it is none of the embedded ones.
    """
    claimed, variant = contents.manifest.base_model, contents.layout.variant.name
    if {contents.manifest.variant, claimed.get("variant")} != {variant}:
        raise DamagedFileError(
            f"the manifest is of a {contents.manifest.variant}, made from a {claimed.get('variant')}; the weights are a {variant}"
        )
    original = embedded_original(contents)
    if original is None:
        raise NotCheckedError(
            "its weights are not in the archive: compare its digest with your own copy of the model (`ptq generate` writes it to run.json), and the files of weights/ besides the experts"
        )
    layout = read_layout(original[0])
    if claimed != base_model_identity(layout, {name: ShardSet(layout.path / name) for name in layout.experts}):
        raise DamagedFileError(f"the reference run is of {original[0].name}, the manifest names another original model")
    ours, theirs = (_besides_experts(path, layout.experts) for path in (contents.weights, layout.path))
    other = sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
    if other:
        raise DamagedFileError(
            f"weights/{other[0]} is not as in {original[0].name} ({len(other)} such files): then not only the experts differ between the runs"
        )
    return f"the embedded model {original[0].name}; {len(theirs)} files besides the experts equal its own"


def _besides_experts(model: Path, experts: Collection[str]) -> dict[str, str]:
    """Path -> sha256 of the index and of the files of every component that is not quantized."""
    files = [
        path
        for folder in model.iterdir()
        if folder.is_dir() and folder.name not in experts
        for path in files_below(folder)
    ]
    return {path.relative_to(model).as_posix(): sha256_file(path) for path in (model / INDEX, *files)}
