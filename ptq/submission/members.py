"""Whether a submission's members are those that it should have, and say what they should: nothing more, nothing else."""

from __future__ import annotations

import re

from ptq.checkpoint.manifest import MANIFEST_FILE, statement_of, verify_files
from ptq.errors import DamagedFileError
from ptq.store.evaluation import FILE as EVALUATION_FILE
from ptq.store.evaluation import ROLES
from ptq.store.evaluation_units import FILE as UNITS_FILE
from ptq.store.files import digest, sha256_file
from ptq.store.run_info import FILE as RUN_FILE
from ptq.submission.check import NotCheckedError
from ptq.submission.contents import CALIBRATION, CHECKSUMS, EVALUATION, REPORT, RUNS, SOURCE, WEIGHTS, Contents
from ptq.submission.derive import derive
from ptq.submission.package import PROJECT_FILES, refuse_code, source_files
from ptq.version import __version__

_MANIFEST = re.compile(rf"{RUNS}/(?:{'|'.join(ROLES)})/manifest-\d+of\d+\.jsonl")


def check_members(contents: Contents) -> str:
    """Every member that a submission has is there, and no other.

    Raises:
        DamagedFileError: names what is missing, or what does not belong there.
    """
    names = set(contents.names)
    fixed = {
        *(CHECKSUMS, f"{REPORT}/report.pdf", f"{REPORT}/report.html"),
        *(f"{EVALUATION}/{name}" for name in (EVALUATION_FILE, UNITS_FILE)),
        *(f"{RUNS}/{role}/{RUN_FILE}" for role in ROLES),
        f"{WEIGHTS}/{MANIFEST_FILE}",
        *(f"{WEIGHTS}/{name}" for name in contents.manifest.files),
    }
    missing = sorted(fixed - names)
    if missing:
        raise DamagedFileError(f"missing: {', '.join(missing[:5])}")
    fixed |= _derived(contents).keys()
    measured = set(contents.measured_files())
    if measured & names:
        fixed |= measured
    missing = sorted(fixed - names)
    if missing:
        raise DamagedFileError(f"missing: {', '.join(missing[:5])} ({len(missing)} such members)")
    allowed = {CALIBRATION, *(f"{SOURCE}/{name}" for name in (*source_files(), *PROJECT_FILES))}
    rest = names - fixed - allowed
    strange = sorted(name for name in rest if not _MANIFEST.fullmatch(name) and not name.startswith(f"{SOURCE}/ptq/"))
    if strange:
        raise DamagedFileError(f"{strange[0]} does not belong in a submission ({len(strange)} such members)")
    refuse_code(name.removeprefix(f"{WEIGHTS}/") for name in names if name.startswith(f"{WEIGHTS}/"))
    return f"{len(names)} members"


def check_checksums(contents: Contents) -> str:
    """Compare every member with SHA256SUMS, in both directions.

    Raises:
        DamagedFileError: names the first member that differs.
    """
    recorded: dict[str, str] = {}
    for line in contents.text(CHECKSUMS).decode("utf-8").splitlines():
        value, separator, name = line.partition("  ")
        if not separator or name in recorded:
            raise DamagedFileError(f"{CHECKSUMS} has a damaged or repeated line: {line[:80]!r}")
        recorded[name] = value
    unlisted = sorted(set(contents.names) - set(recorded) - {CHECKSUMS})
    if unlisted:
        raise DamagedFileError(f"{unlisted[0]} is not listed in {CHECKSUMS} ({len(unlisted)} such members)")
    present = set(contents.names)
    for name, value in recorded.items():
        if name not in present:
            raise DamagedFileError(f"{name} is listed in {CHECKSUMS} but not in the archive")
        if sha256_file(contents.root / name) != value:
            raise DamagedFileError(f"{name} was changed: its sha256 is not the recorded one")
    return f"{len(recorded)} checksums"


def check_manifest(contents: Contents) -> str:
    """Every file of the checkpoint has the digest of its manifest, and there is no other file.

    Raises:
        DamagedFileError: as `verify_files`.
    """
    manifest = verify_files(contents.weights)
    statement = statement_of(manifest.coverage.residual_share)
    if manifest.statement != statement:
        raise DamagedFileError(
            f"the manifest states {manifest.statement[:200]!r}, checkpoints of this package: {statement!r}"
        )
    return f"{len(manifest.files)} files"


def check_calibration(contents: Contents) -> str:
    """calibration.json is the one that the manifest names, its digest computed again.

    Raises:
        DamagedFileError: it is another one. NotCheckedError: the archive has none.
    """
    info, recorded = contents.calibration, contents.manifest.calibration
    if info is None:
        raise NotCheckedError("the archive has no calibration.json: only its digest is known")
    again = digest({"settings": info.decisive(), "files": info.files})
    if recorded is None or {info.digest, again} != {recorded["digest"]}:
        raise DamagedFileError(
            f"{CALIBRATION} is not the calibration that the manifest names: its digest is {again[:12]}"
        )
    if info.prompts != recorded["prompts"] or [sample.as_json() for sample in info.samples] != recorded["samples"]:
        raise DamagedFileError(f"{CALIBRATION} and the manifest list other prompts")
    return f"{len(info.samples)} prompts, digest {again[:12]}"


def check_texts(contents: Contents) -> str:
    """Recipe, prompts, README, script and claims are those that follow from manifest, evaluation and runs.

    Raises:
        DamagedFileError: names the file and the first line that differs.
    """
    derived = _derived(contents)
    for name, wanted in derived.items():
        found = contents.text(name)
        if found != wanted:
            raise DamagedFileError(
                f"{name} is not what manifest, evaluation and runs give: {_first_difference(found, wanted)}"
            )
    return ", ".join(sorted(derived))


def check_source(contents: Contents) -> str:
    """The source is that of the package which verifies, file by file.

    Raises:
        DamagedFileError: names the first file that differs.
    """
    here = {f"{SOURCE}/{name}": path for name, path in source_files().items()}
    there = {name for name in contents.names if name.startswith(f"{SOURCE}/")}
    unknown = sorted(there - set(here) - {f"{SOURCE}/{name}" for name in PROJECT_FILES})
    absent = sorted(name for name in set(here) - there if name.startswith(f"{SOURCE}/ptq/"))
    changed = sorted(name for name in there & set(here) if sha256_file(contents.root / name) != sha256_file(here[name]))
    different = [*changed, *unknown, *absent]
    if different:
        raise DamagedFileError(
            f"{len(different)} files of source/ are not those of this package, version {__version__}, for example {different[0]}. Verify with the version that packed it ({contents.evaluation.ptq_version}), from where you trust it"
        )
    unseen = sorted(name for name in there if name not in here)
    rest = f"; not checked, for this package was installed without them: {', '.join(unseen)}" if unseen else ""
    return f"{len(there & set(here))} files equal those of this package, version {__version__}{rest}"


def _derived(contents: Contents) -> dict[str, bytes]:
    lines = {name: line for name, line in contents.lines["candidate"].items() if line.is_done}
    return derive(contents.weights, contents.manifest, contents.evaluation, contents.calibration, contents.infos, lines)


def _first_difference(found: bytes, wanted: bytes) -> str:
    pairs = zip(found.splitlines(), wanted.splitlines(), strict=False)
    number, (one, other) = next(((n, p) for n, p in enumerate(pairs, 1) if p[0] != p[1]), (0, (b"", b"")))
    if not number:
        return f"{len(found)} bytes for {len(wanted)}"
    return f"line {number} is {one[:100].decode(errors='replace')!r}, expected {other[:100].decode(errors='replace')!r}"
