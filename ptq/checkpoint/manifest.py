"""ptq_manifest.json: where a packed checkpoint came from, how every layer fared, and the digest of every file.

Strict on reading: inspect, report, package and verify all rely on it.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ptq.config.recipe import Recipe, translate
from ptq.errors import DamagedFileError, PtqError
from ptq.store.files import files_below, read_json, sha256_file, write_json
from ptq.store.lora import LoraInfo, LoraTable
from ptq.store.schema import Count, NotNegative, PlainName, Positive, Schema, Share, parse
from ptq.version import __version__

MANIFEST_FILE = "ptq_manifest.json"
CARD_FILE = "README.md"
"""The model card: for people, rewritten when there is a verdict."""
NOT_DONE = "No layer outside the protected blocks runs in higher precision at run time; no bf16 warm-up steps, no bf16 outlier columns, no pasting of the input image, no resetting of latents, no calibration on evaluation prompts."

NOT_DONE_BUT = "Some input channels are multiplied in two 4-bit words, value and residual ({share:.2%} more products). "
"""What a checkpoint with residual blocks states before that."""


def statement_of(residual_share: float) -> str:
    """What a checkpoint states about precision."""
    return (NOT_DONE_BUT.format(share=residual_share) if residual_share else "") + NOT_DONE


class LayerEntry(Schema):
    """One quantized Linear, and how plain rounding in the same basis would have done.

    Errors are squared norm ratios. output_error: sample tokens, inputs quantized too. trace_error: all calibration
    tokens, weights only (absent where the recipe needs no Hessian). weight_sqnr_db: None where weight or error is zero.
    tokens: of the records, in the Hessian (where the recipe needs none: replayed); sample_tokens: those of the searches.
    basis: off, the exponent of smoothing, or learned; basis_errors: output errors of what it was chosen from.
    residual_blocks: their numbers. Errors of single layers are without them and before tuning, those of blocks and experts with both.
    """

    expert: PlainName
    block: Count
    layer: PlainName
    shape: tuple[Count, Count] = Field(strict=False)
    weight_sqnr_db: float | None
    output_error_rtn: NotNegative
    output_error: NotNegative
    trace_error_rtn: float | None = None
    trace_error: float | None = None
    rows_kept_rtn: Count = 0
    tokens: Count
    sample_tokens: Count
    basis: str = "off"
    basis_errors: dict[str, float] = Field(default={})
    damping: float | None = None
    damping_retries: Count = 0
    dead_columns: Count = 0
    residual_blocks: tuple[Count, ...] = Field(default=(), strict=False)


class TuningEntry(Schema):
    """How tuning a block's codes went: records that it was tuned on and that were held out, and the error of the block's output on the
    latter (squared norm ratio, original inputs), before and after."""

    records: Count
    held_out: Count
    before: NotNegative
    after: NotNegative

    @property
    def kept(self) -> bool:
        """Whether the block has the tuned codes."""
        return self.after < self.before


class BlockEntry(Schema):
    """Error of the propagated stream after a block, relative to the original stream (squared norm ratio); how its codes were tuned."""

    expert: PlainName
    block: Count
    stream_error: NotNegative
    high_precision: bool
    reason: str | None = None
    seconds: NotNegative
    tuning: TuningEntry | None = None


class ExpertEntry(Schema):
    """Denoiser output error of one expert on the calibration records (squared norm ratio, weighted)."""

    expert: PlainName
    denoiser_error: NotNegative
    records: Count


class Coverage(Schema):
    """How much of the model is W4A4.

    quantized_bytes: codes and scales; basis_bytes: what the quantized layers store of their basis beside them.
    residual_share: products of residual blocks, relative to those of the quantized layers without them.
    flop_share: of the operations, those of residual blocks included.
    """

    linear_parameters: Count
    quantized_parameters: Positive
    parameter_share: Share
    flop_share: Share
    bits_per_quantized_value: NotNegative
    quantized_bytes: Count
    basis_bytes: Count
    original_bytes: Count
    residual_share: Share = 0.0

    @property
    def bits_with_basis(self) -> float:
        """Bits a quantized value takes with smoothing vectors or learned blocks counted."""
        return 8 * (self.quantized_bytes + self.basis_bytes) / self.quantized_parameters


class Manifest(Schema):
    """The whole manifest."""

    manifest_version: Literal[1] = 1
    package_version: str
    versions: dict[str, str]
    format: str
    variant: str
    base_model: dict[str, Any]
    recipe_name: str
    recipe: Recipe
    earlier_keys: dict[str, Any] = Field(default={}, exclude=True)
    """Recipe keys of an earlier version that today's recipes cannot say, with their values; never written."""
    calibration: dict[str, Any] | None
    high_precision: list[str]
    budget_scope: str
    coverage: Coverage
    experts: list[ExpertEntry]
    blocks: list[BlockEntry]
    layers: list[LayerEntry]
    signature: str
    seconds: NotNegative
    peak_memory_bytes: Count
    statement: str = NOT_DONE
    files: dict[str, str]

    @model_validator(mode="before")
    @classmethod
    def _translate_recipe(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("recipe"), dict):
            recipe, earlier = todays_recipe(value["recipe"], value.get("format"))
            return {**value, "recipe": recipe, "earlier_keys": earlier}
        return value

    @field_validator("calibration")
    @classmethod
    def _known_loras(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        LoraTable.model_validate({"lora": (value or {}).get("lora", {})})
        return value

    @property
    def loras(self) -> dict[str, LoraInfo]:
        """Expert -> LoRA that was merged into it before it was quantized."""
        return LoraTable.model_validate({"lora": (self.calibration or {}).get("lora", {})}).lora

    @property
    def digest(self) -> str:
        """Identity of the checkpoint: the digest over its files' digests."""
        from ptq.store.files import digest

        return digest(self.files)


def todays_recipe(recipe: dict[str, Any], format_name: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """`translate`, knowing how layers of this format round ties: the same is no difference."""
    today, earlier = translate(recipe)
    if "activations.ties" in earlier:
        from ptq.scheme import FORMATS  # brings torch

        rule = today["scheme"].get("input_rule")
        if format_name in FORMATS and earlier["activations.ties"] == FORMATS[format_name].options(rule)[1]:
            del earlier["activations.ties"]
    return today, earlier


def package_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide results."""
    names = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers", "numpy")
    return {"python": platform.python_version(), "wan-ptq": __version__, **{name: version(name) for name in names}}


def hash_files(directory: Path, exclude: Sequence[str] = ()) -> dict[str, str]:
    """Relative path -> sha256 of every file except the manifest itself and the card, sorted; linked components included.

    Args:
        exclude: names directly below `directory` that are left out.
    """
    names = [str(path.relative_to(directory)) for path in files_below(directory)]
    left_out = {MANIFEST_FILE, CARD_FILE, *exclude}
    return {name: sha256_file(directory / name) for name in names if name.split("/")[0] not in left_out}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write it atomically into the checkpoint."""
    write_json(directory / MANIFEST_FILE, manifest.model_dump(mode="json"))


def read_manifest(directory: str | Path) -> Manifest:
    """Read and validate a checkpoint's manifest.

    Raises:
        PtqError: no packed checkpoint there.
        DamagedFileError: the manifest was edited into something else.
    """
    path = Path(directory) / MANIFEST_FILE
    if not path.exists():
        raise PtqError(f"{directory} is not a packed checkpoint (no {MANIFEST_FILE}). Make one with `ptq quantize`.")
    return parse(Manifest, read_json(path), path, "Copy the checkpoint again, or quantize again.")


def verify_files(directory: str | Path) -> Manifest:
    """Compare every file of a checkpoint with the digests in its manifest.

    Raises:
        DamagedFileError: a file is missing, changed or was added; the text names it.
    """
    manifest = read_manifest(directory)
    found = hash_files(Path(directory))
    for name, expected in manifest.files.items():
        if name == CARD_FILE:  # of the base model, in checkpoints from before there was a card
            continue
        if name not in found:
            raise DamagedFileError(f"{directory} lacks {name}, which its manifest lists. Copy the checkpoint again.")
        if found[name] != expected:
            raise DamagedFileError(
                f"{directory}/{name} was changed since it was written: its sha256 is not the manifest's."
            )
    added = sorted(set(found) - set(manifest.files))
    if added:
        raise DamagedFileError(f"{directory}/{added[0]} is not listed in the manifest ({len(added)} such files).")
    return manifest
