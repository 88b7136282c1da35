"""The JSON files of a pipeline directory, as far as they are read here: types and ranges of every key that is.

They belong to diffusers and transformers, so keys that are not listed are let be.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, model_validator

from ptq.store.schema import Count, Number, Schema

MAX_LAYERS = 1000
"""Of any network; a number beyond is a damaged file, and would be built layer by layer."""
MAX_SIZE = 10**7
"""Of one dimension: the largest real one is a vocabulary of 256,384."""

Layers = Annotated[int, Field(ge=1, le=MAX_LAYERS)]
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Component = Annotated[list[str | None], Field(min_length=2, max_length=2)]
"""Library and class, both null where the pipeline goes without."""


class _Foreign(Schema):
    model_config = ConfigDict(extra="ignore")


class PipelineIndex(_Foreign):
    """model_index.json. boundary_ratio: timesteps at or above boundary_ratio * 1000 go to the first of two experts."""

    class_name: str = Field(alias="_class_name")
    boundary_ratio: float | None = Field(default=None, gt=0, lt=1)
    expand_timesteps: bool | None = None
    scheduler: Component
    text_encoder: Component
    tokenizer: Component
    vae: Component
    transformer: Component = Field(default=[None, None])
    transformer_2: Component = Field(default=[None, None])
    image_encoder: Component = Field(default=[None, None])
    image_processor: Component = Field(default=[None, None])

    @property
    def components(self) -> dict[str, tuple[str, str]]:
        """Name -> (library, class) of the components that the pipeline has."""
        named = {name: value for name, value in self if isinstance(value, list)}
        return {name: (library, kind) for name, (library, kind) in named.items() if library and kind}


class ExpertConfig(_Foreign):
    """config.json of an expert."""

    class_name: str = Field(alias="_class_name")
    num_layers: Layers
    num_attention_heads: Size
    attention_head_dim: Size
    ffn_dim: Size
    in_channels: Size
    out_channels: Size
    text_dim: Size
    patch_size: Annotated[list[Size], Field(min_length=3, max_length=3)]
    image_dim: Size | None = None
    added_kv_proj_dim: Size | None = None
    freq_dim: Size = 256
    rope_max_seq_len: Size = 1024
    pos_embed_seq_len: Size | None = None
    cross_attn_norm: bool = True
    qk_norm: str | None = None
    eps: float = 1e-6


class SchedulerConfig(_Foreign):
    """scheduler_config.json."""

    num_train_timesteps: Size = 1000
    prediction_type: str | None = None
    use_flow_sigmas: bool | None = None
    use_dynamic_shifting: bool | None = None
    flow_shift: float | None = Field(default=None, gt=0)
    shift: float | None = Field(default=None, gt=0)


class VaeConfig(_Foreign):
    """config.json of the VAE. The scale factors are its strides in time and space."""

    z_dim: Size
    base_dim: Size = 96
    decoder_base_dim: Size | None = None
    num_res_blocks: Layers = 2
    patch_size: Size | None = None
    scale_factor_temporal: Size | None = None
    scale_factor_spatial: Size | None = None
    is_residual: bool = False
    dropout: float = 0.0
    latents_mean: list[float] | None = None
    latents_std: list[Annotated[float, Field(gt=0)]] | None = None

    @model_validator(mode="after")
    def _one_a_channel(self) -> VaeConfig:
        for name, values in (("latents_mean", self.latents_mean), ("latents_std", self.latents_std)):
            if values is not None and len(values) != self.z_dim:
                raise ValueError(f"{name} should have z_dim = {self.z_dim} values, found {len(values)}")
        return self


class TextEncoderConfig(_Foreign):
    """config.json of the text encoder."""

    d_model: Size
    num_layers: Layers
    vocab_size: Size
    layer_norm_epsilon: float = Field(default=1e-6, gt=0, lt=1)


class ImageEncoderConfig(_Foreign):
    """config.json of the image encoder."""

    num_hidden_layers: Layers = 12
    image_size: Size = 224
    patch_size: Size = 32


class TokenizerConfig(_Foreign):
    """tokenizer_config.json."""

    tokenizer_class: str | None = None
    model_max_length: Number | None = None


class TokenizerModel(_Foreign):
    """The vocabulary in tokenizer.json: piece -> number, or pieces with their scores."""

    vocab: dict[str, Count] | list[Annotated[list[str | float], Field(min_length=2, max_length=2)]]


class TokenizerFile(_Foreign):
    """tokenizer.json."""

    model: TokenizerModel


class ProcessorConfig(_Foreign):
    """preprocessor_config.json of the image encoder."""

    image_processor_type: str | None = None


TOKENS: dict[str, type[Schema]] = {
    "tokenizer.json": TokenizerFile,
    "tokenizer_config.json": TokenizerConfig,
    "preprocessor_config.json": ProcessorConfig,
    "processor_config.json": ProcessorConfig,
}
"""JSON of the components without weights -> what is read of it."""
PARTS = {"vae": VaeConfig, "text_encoder": TextEncoderConfig, "image_encoder": ImageEncoderConfig}
"""Component beside the experts -> what is read of its config.json."""
