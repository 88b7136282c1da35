"""How diffusers loads and saves a packed component: the quantizer behind `quant_method: "ptq"`.

diffusers has no registration call; its two mappings are plain dictionaries (see register.py). Before any tensor is read
the whole component is checked against its configuration: every file complete, every tensor present, of the right shape
and dtype, none unexpected. While tensors are loaded their checksums are compared with the index. Afterwards nothing may
be left on the meta device. diffusers itself would only warn about most of these.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from ptq.checkpoint.comparison import check_tensors
from ptq.checkpoint.layers import replace_linears
from ptq.checkpoint.quantization_config import QUANT_METHOD, PackedConfig
from ptq.checkpoint.safetensors_file import TensorEntry, read_header, tensor_crc32
from ptq.checkpoint.saving import keep_companions, refuse_adapters, refuse_pickles
from ptq.checkpoint.shards import INDEX_NAME, read_index
from ptq.errors import DamagedFileError, UsageError
from ptq.runtime.unreadable import REFUSAL


class PtqMethod(StrEnum):
    """A string with a `.value`, which diffusers calls; a plain string does not do."""

    PTQ = QUANT_METHOD


class PtqConfig(QuantizationConfigMixin):
    """The quantization configuration as diffusers carries it around; the content is a `PackedConfig`."""

    def __init__(self, **fields: Any) -> None:
        fields.pop("quant_method", None)
        self.quant_method = PtqMethod.PTQ
        self.packed = PackedConfig.parse({"quant_method": QUANT_METHOD, **fields})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary, as found in config.json."""
        return self.packed.to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        """Called when diffusers prints or saves the configuration; there are no defaults worth hiding."""
        return self.to_dict()


def refuse_fusing(*_: Any, **__: Any) -> None:
    """Stands in for `fuse_lora` of a packed component.

    Raises:
        UsageError: always.
    """
    raise UsageError(REFUSAL)


class PtqQuantizer(DiffusersQuantizer):
    """Replaces the target Linears by `QuantLinear` and lets diffusers fill in the packed tensors."""

    use_keep_in_fp32_modules = True  # without it Wan's time embedder, norms and scale_shift_table load in bf16
    requires_calibration = False

    def __init__(self, quantization_config: PtqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.packed = quantization_config.packed
        self._entries: dict[str, TensorEntry] = {}
        self._checksums: dict[str, int] = {}
        self._disk_offload = False
        self.ptq_directory: Path | None = None
        """Where the component was loaded from."""

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Called with the file names before tensors are read: validate every header, find the checksums."""
        for file in checkpoint_files:
            self._entries.update(read_header(file))
        self.ptq_directory = Path(checkpoint_files[0]).parent
        index = self.ptq_directory / INDEX_NAME
        if index.exists():
            self._checksums = read_index(index).metadata.ptq_crc32
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        replace_linears(model, self.packed)
        check_tensors(self.ptq_directory or Path("the checkpoint"), self._entries, model.state_dict())

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Called for each shard: compare the bytes with the checksums of the index."""
        for name, tensor in state_dict.items():
            expected = self._checksums.get(name)
            if expected is not None and tensor.device.type == "cpu" and tensor_crc32(tensor) != expected:
                raise DamagedFileError(
                    f"{self._entries[name].file}: the bytes of tensor {name} differ from the checksum in {INDEX_NAME}. The file was edited or damaged; copy it again."
                )
        return state_dict

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Called before and after diffusers resolves the device map; weights offloaded to disk stay on meta."""
        device_map = kwargs.get("device_map")
        self._disk_offload = isinstance(device_map, dict) and "disk" in device_map.values()

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        for name, tensor in model.state_dict().items():
            if tensor.is_meta and not self._disk_offload:
                raise DamagedFileError(f"Tensor {name} was not loaded; the checkpoint is incomplete.")
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline  # which imports this file

        keep_companions(DiffusionPipeline)
        model.fuse_lora = refuse_fusing  # before the first layer is scaled or an unquantized one merged

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Called by save_pretrained: every tensor gets the dtype it had on disk, so saving again changes nothing.

        Raises:
            UsageError: pickles are asked for, or an adapter lies beside the layers.
        """
        refuse_pickles(safe_serialization)
        refuse_adapters(state_dict)
        on_disk = {name: entry.torch_dtype for name, entry in self._entries.items()}
        return {name: tensor.to(on_disk.get(name, tensor.dtype)) for name, tensor in state_dict.items()}, {}

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> torch.dtype:
        """Device maps are sized with this dtype; packed weights take about half a byte a value."""
        return torch.int8

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def supports_safetensors_serialization(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True  # a layer is one operator, see `ptq.runtime.ops`

    @property
    def is_trainable(self) -> bool:
        return False


auto.AUTO_QUANTIZER_MAPPING[PtqMethod.PTQ.value] = PtqQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[PtqMethod.PTQ.value] = PtqConfig
