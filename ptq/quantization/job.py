"""One quantize run as a value: what it is made from, how, where to, and its sizes. What it will take: `ptq.quantization.plan`."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ptq.checkpoint.manifest import Coverage, package_versions
from ptq.checkpoint.quantization_config import PackedConfig
from ptq.checkpoint.safetensors_file import TensorEntry
from ptq.checkpoint.shards import MAX_SHARD_BYTES, ShardSet
from ptq.config.load import validate
from ptq.errors import UsageError
from ptq.known import RESIDUAL_BLOCK
from ptq.quantization.calls import ExpertCalls, record_size, records_together, spread
from ptq.quantization.placing import StreamsOption
from ptq.quantization.processes import ALONE, Processes
from ptq.quantization.settings import QuantizeSettings
from ptq.quantization.tune import split
from ptq.quantization.workdir import refuse_taken
from ptq.rules import check_budget
from ptq.scheme import FormatError
from ptq.store.calibration import CalibrationSet
from ptq.store.files import digest
from ptq.store.lora import LoraInfo
from ptq.wan.block import block_prefix, rows_outside
from ptq.wan.estimates import CallSize
from ptq.wan.identity import base_model_identity
from ptq.wan.layout import ModelLayout
from ptq.wan.lora import recorded_loras
from ptq.wan.merge import MergedShards
from ptq.wan.presets import SAMPLING, ModelPreset
from ptq.wan.replay import ExpertReplay


@dataclass(frozen=True)
class QuantizeOptions:
    """How to run, without influence on the codes.

    Attributes:
        device: of the replay.
        max_memory: bytes that the two streams of hidden states may take in RAM; beyond, they are memory-mapped files.
            None: half of what is available.
        streams: where they are; "auto": the fastest place in which they fit.
        link: link unchanged components instead of copying them.
        fresh: discard an unfinished run.
        max_shard_bytes: limit of a weight file.
    """

    device: str = "cpu"
    max_memory: int | None = None
    streams: StreamsOption = "auto"
    link: bool = False
    fresh: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES

    @property
    def dtype(self) -> torch.dtype:
        """In which blocks run."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    @property
    def stream_limit(self) -> int:
        """Bytes that the streams may take in RAM."""
        return psutil.virtual_memory().available // 2 if self.max_memory is None else self.max_memory


@dataclass(frozen=True)
class Job:
    """One run of `ptq quantize`.

    Attributes:
        layout: the original pipeline.
        calibration: records made from it.
        settings: format, recipe, protected blocks.
        out: directory to create; it appears only when complete.
        options: device, memory, linking.
        processes: this process among those that share the work.
    """

    layout: ModelLayout
    calibration: CalibrationSet
    settings: QuantizeSettings
    out: Path
    options: QuantizeOptions = QuantizeOptions()
    processes: Processes = ALONE

    # What it is made from.

    @functools.cached_property
    def loras(self) -> dict[str, LoraInfo]:
        """Expert -> LoRA that the records were made with, where its file lies now.

        Raises:
            PtqError: a file is missing or another one.
        """
        return recorded_loras(self.calibration.directory, self.calibration.info.lora)

    @functools.cached_property
    def shards(self) -> dict[str, ShardSet]:
        """Expert -> its original tensors, with the LoRA of the records in them."""
        return {
            expert: MergedShards(self.layout.path / expert, self.loras[expert])
            if expert in self.loras
            else ShardSet(self.layout.path / expert)
            for expert in self.layout.experts
        }

    def merged_entries(self, expert: str, names: Sequence[str], file: Path) -> dict[str, TensorEntry]:
        """Those of these tensors that are the original's but for a LoRA, written to a file of their own; {} without one."""
        shards = self.shards[expert]
        return shards.write_merged(file, names) if isinstance(shards, MergedShards) else {}

    def check(self) -> None:
        """Refuse contradictory inputs before any work.

        Raises:
            UsageError: an output directory that is taken, packed input, records of another model or of only one expert, too few to
                hold some out of tuning, widths that do not fit the scheme, too many protected blocks.
        """
        layout, calibration = self.layout, self.calibration
        refuse_taken(self.out)
        if layout.is_packed:
            raise UsageError(f"{layout.path} is already a packed checkpoint; quantize the original model instead.")
        if calibration.info.experts != {name: digest(config) for name, config in layout.experts.items()}:
            raise UsageError(
                f"{calibration.directory} was recorded from another model than {layout.path} (experts or their config.json differ). Record this model with `ptq calibrate` first."
            )
        recorded_as = calibration.info.variant
        if recorded_as != layout.variant.name:
            raise UsageError(
                f"{calibration.directory} was recorded from {layout.variant.title} taken for {recorded_as}, with the flow shift and steps of that. Record this model again with `ptq calibrate`, into another --out."
            )
        _ = self.loras
        for expert in layout.experts:
            if not calibration.of_expert(expert):
                raise UsageError(
                    f"{calibration.directory} has no records of {expert}. Record more steps (--steps, --records-per-prompt) so that every expert is called."
                )
            self.tuning_records(expert)
            for name, (_, k) in layout.linear_shapes(expert).items():
                try:
                    self.settings.scheme.check_width(k)
                except FormatError as error:
                    raise UsageError(f"{expert} of {layout.path}, {name}: {error}") from error
        check_budget(self.settings.format, self.settings.high_precision, self.settings.budget_scope)

    @functools.cached_property
    def signature(self) -> dict[str, Any]:
        """Everything that decides the codes; two runs with equal signatures may share finished blocks."""
        settings = self.settings
        protected = {expert: list(blocks) for expert, blocks in settings.high_precision.items()}
        return {
            "model": base_model_identity(self.layout, self.shards),
            "calibration": self.calibration.digest,
            "format": settings.format,
            "recipe": settings.recipe.model_dump(mode="json", exclude={"description"}),
            "high_precision": "auto" if settings.auto_protect else protected,
            "budget_scope": settings.budget_scope,
            "seed": settings.seed,
            "versions": package_versions(),
        }

    @property
    def recorded_preset(self) -> ModelPreset:
        """The model's preset with the settings that the records were made with: defaults of what is made from them."""
        recorded = {name: value for name, value in self.calibration.info.preset.items() if name in SAMPLING}
        where = f"{self.calibration.directory}/calibration.json"
        return validate(ModelPreset, self.layout.preset.model_dump() | recorded, where)

    def replay(self, expert: str) -> ExpertReplay:
        """The original expert, block by block."""
        return ExpertReplay(self.shards[expert], self.layout.experts[expert], self.options.device, self.options.dtype)

    def calls(self, expert: str, replay: ExpertReplay) -> ExpertCalls:
        """The recorded calls of an expert that are replayed."""
        return ExpertCalls(expert, replay, self.calibration, self.settings.record_limit)

    def packed(self, expert: str) -> PackedConfig:
        """What the packed expert's config.json says."""
        protected = tuple(sorted(self.settings.high_precision.get(expert, ())))
        return PackedConfig(self.settings.scheme, tuple(self.layout.linear_shapes(expert)), protected)

    # Its sizes.

    def call_size(self, expert: str) -> CallSize:
        """Size of an expert's recorded calls, from the first of them."""
        return record_size(self.calibration, self.calibration.of_expert(expert)[0], self.layout.experts[expert])

    def used_records(self, expert: str) -> int:
        """How many records of an expert are replayed."""
        return len(spread(self.calibration.of_expert(expert), self.settings.record_limit))

    def together(self, expert: str) -> int:
        """How many records of an expert are replayed at a time."""
        return min(self.used_records(expert), records_together(self.call_size(expert)))

    def stream_bytes(self, expert: str) -> int:
        """Bytes of both streams of hidden states of an expert's records, and of a block's inputs where it is tuned."""
        tokens, records = (
            self.call_size(expert).tokens,
            2 * self.used_records(expert) + sum(self.tuning_records(expert)),
        )
        return self.options.dtype.itemsize * self.layout.width(expert) * tokens * records

    def tuning_records(self, expert: str) -> tuple[int, int]:
        """How many records of an expert its blocks are tuned on, and how many are held out for that.

        Raises:
            UsageError: none can be held out.
        """
        tune = self.settings.recipe.solver.tune
        tuned, held_out = split(self.calibration.of_expert(expert), tune.prompts) if tune else ([], [])
        return len(tuned), len(held_out)

    def coverage(self, residual: Mapping[str, Mapping[str, Sequence[int]]] | None = None) -> Coverage:
        """How much of the model is W4A4, over all experts. Linear parameters are 2-D weights of the experts (embedders and
        output included).

        residual: expert -> layer -> its residual blocks.
        """
        scheme = self.settings.scheme
        linear = quantized = basis_bytes = 0
        flops = quantized_flops = residual_flops = 0.0
        for expert in self.layout.experts:
            call, inputs = self.call_size(expert), self.layout.block_inputs(expert).values()
            rows = {
                f"{block_prefix(index)}{name}.weight": item.rows
                for index in range(self.layout.num_blocks(expert))
                for item in inputs
                for name in item.linears
            }
            kept = tuple(block_prefix(index) for index in self.settings.high_precision.get(expert, ()))
            for name, entry in self.shards[expert].entries.items():
                if not name.endswith(".weight") or len(entry.shape) != 2:
                    continue
                size = math.prod(entry.shape)
                cost = 2.0 * size * call.rows(rows.get(name) or rows_outside(name))
                linear += size
                flops += cost
                if name in rows and not name.startswith(kept):
                    quantized += size
                    basis_bytes += scheme.basis_bytes(entry.shape[1])
                    quantized_flops += cost
                    blocks = (residual or {}).get(expert, {}).get(name.removesuffix(".weight"), ())
                    residual_flops += cost * RESIDUAL_BLOCK * len(blocks) / entry.shape[1]
        bits = scheme.format.bits_per_value
        return Coverage(
            linear_parameters=linear,
            quantized_parameters=quantized,
            parameter_share=quantized / linear,
            flop_share=(quantized_flops + residual_flops) / (flops + residual_flops),
            bits_per_quantized_value=bits,
            quantized_bytes=int(quantized * bits / 8),
            basis_bytes=basis_bytes,
            original_bytes=sum(e.nbytes for shards in self.shards.values() for e in shards.entries.values()),
            residual_share=residual_flops / quantized_flops if quantized_flops else 0.0,
        )

    def packed_bytes(self) -> int:
        """Bytes of all experts after quantization."""
        covered = self.coverage()
        entries = (entry for shards in self.shards.values() for entry in shards.entries.values())
        itemsize = max(entry.torch_dtype.itemsize for entry in entries)
        kept = covered.original_bytes - covered.quantized_parameters * itemsize
        return kept + covered.quantized_bytes + covered.basis_bytes
