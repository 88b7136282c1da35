"""What the packed weights are, counted from their tensors: format, scheme, protected blocks, coverage.

The tensor tables of the shards are the only basis. config.json, manifest and recipe are compared with them, and all numbers
in a config.json are bounded by them before a library builds anything from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ptq import limits
from ptq.checkpoint.manifest import Manifest
from ptq.checkpoint.quantization_config import PackedConfig
from ptq.checkpoint.safetensors_file import TensorEntry, read_header
from ptq.checkpoint.shards import ShardSet
from ptq.errors import DamagedFileError
from ptq.known import RESIDUAL_BLOCK
from ptq.rules import BUDGET_SCOPE, block_budget, check_budget
from ptq.scheme import Scheme
from ptq.store.files import digest, read_json
from ptq.submission.contents import Contents
from ptq.wan.block import BLOCKS, BlockInput, block_prefix, rows_outside
from ptq.wan.estimates import CallSize, call_size

TOLERANCE = 1e-9
"""Relative, of shares: the same sums in another order."""


@dataclass(frozen=True)
class Expert:
    """One expert: its tensors, what its config.json says of them, the inputs of its blocks, its number of blocks."""

    name: str
    entries: Mapping[str, TensorEntry]
    packed: PackedConfig
    inputs: Mapping[str, BlockInput]
    blocks: int

    def linears(self) -> Iterator[tuple[int, str, BlockInput]]:
        """(block, name in the block, its input) of every Linear of the blocks."""
        for index in range(self.blocks):
            for item in self.inputs.values():
                for linear in item.linears:
                    yield index, linear, item

    def is_packed(self, index: int, linear: str) -> bool:
        return f"{block_prefix(index)}{linear}.weight_packed" in self.entries


def read_experts(contents: Contents) -> dict[str, Expert]:
    """The experts, after their configurations were held against the tables of their tensors.

    Raises:
        DamagedFileError: a config.json that its tensors do not bear out.
    """
    _check_numbers(contents)
    layout, experts = contents.layout, {}
    for name, config in layout.experts.items():
        entries = ShardSet(contents.weights / name).entries
        found = {entry.split(".")[1] for entry in entries if entry.startswith(f"{BLOCKS}.")}
        if found != {str(index) for index in range(min(layout.num_blocks(name), len(entries) + 1))}:
            raise DamagedFileError(
                f"{name}: config.json says {layout.num_blocks(name)} blocks, its tensors are of {len(found)}"
            )
        packed = PackedConfig.parse(config.get("quantization_config") or {}, f"{name}/config.json")
        experts[name] = Expert(name, entries, packed, layout.block_inputs(name), len(found))
    return experts


def _check_numbers(contents: Contents) -> None:
    """Sizes in a component's config.json: none beyond all use, and no more layers than the component has tensors."""
    for path in sorted(contents.weights.glob("*/config.json")):
        tensors = sum(len(read_header(file)) for file in path.parent.glob("*.safetensors"))
        for key, value in _numbers(read_json(path)):
            most = tensors if "layers" in key or "blocks" in key else limits.CONFIG_NUMBER
            if not abs(value) <= most:
                raise DamagedFileError(
                    f"{path.parent.name}/config.json says {key} = {value:.6g}; at most {most} is possible"
                )


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def check_scheme(contents: Contents) -> str:
    """Every Linear of a block is either packed, with the tensors of one scheme, or as in the original.

    Raises:
        DamagedFileError: tensors, config.json, manifest and recipe are not of one scheme and format.
    """
    manifest = contents.manifest
    wanted = Scheme.of(manifest.format, **manifest.recipe.scheme.model_dump())
    count, experts = 0, read_experts(contents)
    for expert in experts.values():
        scheme = expert.packed.scheme
        if scheme != wanted:
            raise DamagedFileError(
                f"{expert.name}/config.json says {scheme.describe()}; format and recipe of the manifest say {wanted.describe()}"
            )
        if set(expert.packed.targets) != {name for item in expert.inputs.values() for name in item.linears}:
            raise DamagedFileError(
                f"{expert.name}/config.json quantizes {', '.join(expert.packed.targets)}, not all Linears of a block"
            )
        for index, linear, item in expert.linears():
            count += _check_linear(expert, scheme, f"{block_prefix(index)}{linear}", item)
        _check_residual(expert, manifest)
        original = {
            key: value for key, value in contents.layout.experts[expert.name].items() if key != "quantization_config"
        }
        recorded = manifest.base_model.get("configs", {}).get(expert.name)
        if digest(original) != recorded:
            raise DamagedFileError(f"{expert.name}/config.json is not that of the original model in the manifest")
    _check_entries(manifest, experts)
    if manifest.format != contents.identity.format:
        raise DamagedFileError(f"the manifest says {manifest.format}, the weights are {contents.identity.format}")
    return f"{wanted.describe()}; {count} Linears packed"


def _check_residual(expert: Expert, manifest: Manifest) -> None:
    """The residual blocks of config.json are such of its layers, those of the manifest, and no more than the recipe allows."""
    share, residual = manifest.recipe.solver.residual, expert.packed.residual
    if (residual is not None) != (share > 0):
        raise DamagedFileError(
            f"{expert.name}/config.json has {'no list' if residual is None else 'a list'} of residual blocks, the manifest's recipe says solver.residual = {share:g}"
        )
    listed = {
        f"{block_prefix(row.block)}{row.layer}": row.residual_blocks
        for row in manifest.layers
        if row.expert == expert.name and row.residual_blocks
    }
    if listed != (residual or {}):
        raise DamagedFileError(
            f"{expert.name}/config.json and the manifest list other residual blocks, of {len(residual or {})} and of {len(listed)} layers"
        )
    products = spent = 0
    for index, linear, item in expert.linears():
        if expert.is_packed(index, linear):
            name = f"{block_prefix(index)}{linear}"
            products += item.n * item.k
            spent += item.n * RESIDUAL_BLOCK * len(expert.packed.residual_of(name, item.k) or ())
            listed.pop(name, None)
    if listed:
        raise DamagedFileError(
            f"{expert.name}/config.json lists residual blocks of {next(iter(listed))}, which is not packed"
        )
    if spent > share * products * (1 + TOLERANCE):
        raise DamagedFileError(
            f"{expert.name}/config.json lists residual blocks that add {spent / products:.4%} of the products, more than the {share:.4%} of the recipe"
        )


def _check_entries(manifest: Manifest, experts: Mapping[str, Expert]) -> None:
    """The manifest lists the errors of exactly the layers, blocks and experts that there are."""
    blocks = [(name, index) for name, expert in experts.items() for index in range(expert.blocks)]
    layers = [
        (name, index, linear)
        for name, expert in experts.items()
        for index, linear, _ in expert.linears()
        if expert.is_packed(index, linear)
    ]
    for what, listed, there in (
        ("layers", [(one.expert, one.block, one.layer) for one in manifest.layers], layers),
        ("blocks", [(one.expert, one.block) for one in manifest.blocks], blocks),
        ("experts", [(one.expert,) for one in manifest.experts], [(name,) for name in experts]),
    ):
        if sorted(listed) != sorted(there):
            raise DamagedFileError(
                f"the manifest lists the errors of {len(listed)} {what}, the tensors are of {len(there)}, or of others"
            )


def _check_linear(expert: Expert, scheme: Scheme, name: str, item: BlockInput) -> bool:
    """Whether a Linear is packed; exactly the tensors of either kind are there."""
    packed = {f"{name}.{key}": value for key, value in scheme.tensors(item.n, item.k).items()}
    plain = expert.entries.get(f"{name}.weight")
    there = [key for key in packed if key in expert.entries]
    if plain is not None and not there and plain.shape == (item.n, item.k):
        return False
    if plain is None and len(there) == len(packed):
        wrong = [
            k
            for k, (shape, dtype) in packed.items()
            if (expert.entries[k].shape, expert.entries[k].torch_dtype) != (tuple(shape), dtype)
        ]
        if not wrong:
            return True
        raise DamagedFileError(
            f"{expert.name}: {wrong[0]} has another shape or type than {scheme.format.name} of {item.n} x {item.k}"
        )
    raise DamagedFileError(f"{expert.name}: {name} is neither packed nor a weight of {item.n} x {item.k}")


def check_blocks(contents: Contents) -> str:
    """Count protected blocks from the tensors and compare with configuration, manifest and budget.

    Raises:
        DamagedFileError: the three disagree. UsageError: more than the budget.
    """
    protected: dict[str, set[int]] = {}
    for name, expert in read_experts(contents).items():
        found = {index for index, linear, _ in expert.linears() if not expert.is_packed(index, linear)}
        declared = set(expert.packed.high_precision_blocks)
        if found != declared:
            raise DamagedFileError(
                f"{name}: config.json declares protected blocks {sorted(declared)}, the tensors say {sorted(found)}"
            )
        partly = {index for index, linear, _ in expert.linears() if index in found and expert.is_packed(index, linear)}
        if partly:
            raise DamagedFileError(f"{name}: blocks {sorted(partly)} are packed in part")
        protected[name] = found
    listed = sorted(f"{expert}:{index}" for expert, blocks in protected.items() for index in blocks)
    if listed != sorted(contents.manifest.high_precision):
        raise DamagedFileError(
            f"the manifest lists protected blocks {contents.manifest.high_precision}, the tensors {listed}"
        )
    format_name = str(contents.identity.format)
    check_budget(format_name, protected, BUDGET_SCOPE)
    return f"{', '.join(listed) or 'none'}; {format_name} allows {block_budget(format_name)} over all experts"


def check_coverage(contents: Contents) -> str:
    """Compute the manifest's coverage again from the tensors, the share of operations for the recorded calls.

    Raises:
        DamagedFileError: another number than the manifest says.
    """
    claimed = contents.manifest.coverage
    again: dict[str, float] = {"linear_parameters": 0, "quantized_parameters": 0, "basis_bytes": 0, "kept": 0}
    flops = packed_flops = residual_flops = 0.0
    bits = 0.0
    call = _recorded_call(contents)
    for expert in read_experts(contents).values():
        scheme, inside = expert.packed.scheme, set()
        bits = scheme.format.bits_per_value
        for index, linear, item in expert.linears():
            name = f"{block_prefix(index)}{linear}"
            inside.add(f"{name}.weight")
            cost = 2.0 * item.n * item.k * (call.rows(item.rows) if call else 0)
            again["linear_parameters"] += item.n * item.k
            flops += cost
            if expert.is_packed(index, linear):
                again["quantized_parameters"] += item.n * item.k
                again["basis_bytes"] += scheme.basis_bytes(item.k)
                packed_flops += cost
                blocks = (expert.packed.residual or {}).get(name, ())
                residual_flops += cost * RESIDUAL_BLOCK * len(blocks) / item.k
        quantized = {
            f"{block_prefix(i)}{n}.{t}"
            for i, n, item in expert.linears()
            if expert.is_packed(i, n)
            for t in scheme.tensors(1, scheme.multiple)
        }
        for name, entry in expert.entries.items():
            again["kept"] += 0 if name in quantized else entry.nbytes
            if name not in inside and name.endswith(".weight") and len(entry.shape) == 2:
                size = math.prod(entry.shape)
                again["linear_parameters"] += size
                flops += 2.0 * size * (call.rows(rows_outside(name)) if call else 0)
    kept, quantized_parameters = again.pop("kept"), again["quantized_parameters"]
    again["parameter_share"] = quantized_parameters / again["linear_parameters"]
    again["bits_per_quantized_value"] = bits
    again["quantized_bytes"] = int(quantized_parameters * bits / 8)
    if call is not None:
        again["flop_share"] = (packed_flops + residual_flops) / (flops + residual_flops)
        again["residual_share"] = residual_flops / packed_flops if packed_flops else 0.0
    for key, value in again.items():
        if not math.isclose(getattr(claimed, key), value, rel_tol=TOLERANCE):
            raise DamagedFileError(
                f"the manifest says {key} = {getattr(claimed, key):.9g}, the tensors give {value:.9g}"
            )
    if claimed.original_bytes not in (kept + 2 * quantized_parameters, kept + 4 * quantized_parameters):
        raise DamagedFileError(
            f"the manifest says {claimed.original_bytes} bytes of original experts, which these tensors do not give in 16 or 32 bits"
        )
    share = "" if call is not None else "; share of operations not checked, the archive has no calibration.json"
    return f"{again['parameter_share']:.2%} of Linear parameters, {bits} bits a value{share}"


def _recorded_call(contents: Contents) -> CallSize | None:
    """Size of the calls that were recorded, from calibration.json."""
    calibration = contents.calibration
    if calibration is None:
        return None
    preset = contents.layout.preset.model_copy(
        update={
            key: value for key, value in calibration.preset.items() if key in type(contents.layout.preset).model_fields
        }
    )
    return call_size(contents.layout, preset)
