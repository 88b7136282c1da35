"""The members of the Wan family: what a variant is, how a directory is recognised as one, what is refused by name.

Another variant costs one entry in `VARIANTS`, its generation defaults in `configs/models/<name in lower case>.yaml`, and a
line in docs/guide.md. What it shares with the others (names in a block, head and tail, decoding) is in the files beside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

TRANSFORMER_CLASS = "WanTransformer3DModel"
"""Class of every expert."""
TEXT_PIPELINE, IMAGE_PIPELINE = "WanPipeline", "WanImageToVideoPipeline"
"""Pipeline classes: from text alone, and from a picture and text."""
EXPERTS = ("transformer", "transformer_2")
"""Names of the experts, high noise first; a variant with one expert has only the first."""
NOISE, NOISE_AND_IMAGE = "noise", "noise, mask and image"
"""What the input channels of an expert hold."""
TEXT, TEXT_AND_IMAGE = "text", "text and image"
"""Tokens that a block reads beside the video's."""
MASK_CHANNELS = 4
"""Channels that say which frames are given, between noise and image latents: one for each frame of a latent position."""
LARGE_VIDEO = 600_000
"""Pixels of a frame from which on a video counts as 720p (1280 x 720 is 921,600) and not as 480p (832 x 480 is 399,360)."""


@dataclass(frozen=True)
class Variant:
    """One member of the family.

    Attributes:
        name: as presets, manifests and the command line say it.
        release: "Wan 2.1" or "Wan 2.2".
        hub_ids: diffusers releases of it.
        image: whether videos start from a picture: never, always, or where the user asks for it.
        heads, head_dim, ffn, layers: true size of each expert.
        latent_channels: of the VAE, and of what the experts return.
        boundary_ratio: timesteps at or above boundary_ratio * 1000 go to the first of two experts; None with one expert.
        expand_timesteps: every token has a timestep of its own.
        image_dim: width of the image encoder's hidden states that each block reads beside the text; None without.
        flow_shifts: at 480p and at 720p where the two differ; None where the preset's holds at every size.
    """

    name: str
    release: str
    hub_ids: tuple[str, ...]
    image: Literal["none", "required", "optional"] = "none"
    heads: int = 40
    head_dim: int = 128
    ffn: int = 13824
    layers: int = 40
    latent_channels: int = 16
    boundary_ratio: float | None = None
    expand_timesteps: bool = False
    image_dim: int | None = None
    flow_shifts: tuple[float, float] | None = None

    @property
    def title(self) -> str:
        """Name for people, "Wan 2.1 T2V-14B"."""
        return f"{self.release} {self.name}"

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of its experts, high noise first."""
        return EXPERTS[:1] if self.boundary_ratio is None else EXPERTS

    @property
    def pipeline(self) -> str:
        """Pipeline class of its releases."""
        return IMAGE_PIPELINE if self.image == "required" else TEXT_PIPELINE

    @property
    def in_channels(self) -> int:
        """Channels the experts read: noise, and where an image is required mask and image latents behind it."""
        return self.latent_channels * 2 + MASK_CHANNELS if self.image == "required" else self.latent_channels

    @property
    def structures(self) -> tuple[str, ...]:
        """What its directories look like (`structure_of`); where a picture is optional, they may name either pipeline."""
        channels = NOISE_AND_IMAGE if self.image == "required" else NOISE
        context = TEXT if self.image_dim is None else TEXT_AND_IMAGE
        pipelines = (TEXT_PIPELINE, IMAGE_PIPELINE) if self.image == "optional" else (self.pipeline,)
        boundary = self.boundary_ratio is not None
        return tuple(
            _structure(pipeline, len(self.experts), boundary, self.expand_timesteps, channels, context)
            for pipeline in pipelines
        )

    def flow_shift(self, height: int, width: int) -> float | None:
        """The shift for a frame of this size, None where the variant has no rule."""
        return None if self.flow_shifts is None else self.flow_shifts[height * width >= LARGE_VIDEO]


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("T2V-A14B", "Wan 2.2", ("Wan-AI/Wan2.2-T2V-A14B-Diffusers",), boundary_ratio=0.875),
        Variant("I2V-A14B", "Wan 2.2", ("Wan-AI/Wan2.2-I2V-A14B-Diffusers",), "required", boundary_ratio=0.9),
        Variant(
            "TI2V-5B",
            "Wan 2.2",
            ("Wan-AI/Wan2.2-TI2V-5B-Diffusers",),
            "optional",
            heads=24,
            ffn=14336,
            layers=30,
            latent_channels=48,
            expand_timesteps=True,
        ),
        Variant(
            "T2V-1.3B",
            "Wan 2.1",
            ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers",),
            heads=12,
            ffn=8960,
            layers=30,
            flow_shifts=(3.0, 5.0),
        ),
        Variant("T2V-14B", "Wan 2.1", ("Wan-AI/Wan2.1-T2V-14B-Diffusers",), flow_shifts=(3.0, 5.0)),
        Variant(
            "I2V-14B",
            "Wan 2.1",
            ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"),
            "required",
            image_dim=1280,
            flow_shifts=(3.0, 5.0),
        ),
    )
}
"""Every supported variant by name."""


def variant_title(name: str) -> str:
    """Name for people of a variant that a manifest names."""
    return VARIANTS[name].title if name in VARIANTS else name


SUPPORTED = "Supported are diffusers pipelines (WanPipeline, WanImageToVideoPipeline) of " + " and ".join(
    f"{release} ({', '.join(v.name for v in VARIANTS.values() if v.release == release)})"
    for release in ("Wan 2.2", "Wan 2.1")
)
"""One sentence for errors, without its full stop."""

RELATIVES = {
    "vace": "VACE",
    "animate": "Animate",
    "s2v": "S2V",
    "flf2v": "FLF2V",
    "motion_encoder": "Animate",
    "audio": "S2V",
    "control": "Control",
}
"""Part of a class name, of a configuration key or of an original `model_type` -> the relative of the family it gives away."""


def relative_of(*names: Any) -> str | None:
    """The relative that these names of one Wan model (classes, keys, model type) give away; None where they do not."""
    lowered = " ".join(str(name).lower() for name in names)
    return next((title for part, title in RELATIVES.items() if part in lowered), None) if "wan" in lowered else None


def structure_of(index: Mapping[str, Any], experts: Mapping[str, Mapping[str, Any]]) -> str:
    """What tells variants apart in a pipeline directory, whatever the width of the model, as one comparable line.

    Args:
        index: content of model_index.json.
        experts: expert name -> content of its config.json.
    """
    config = next(iter(experts.values()))
    read, returned = int(config["in_channels"]), int(config["out_channels"])
    channels = {returned: NOISE, 2 * returned + MASK_CHANNELS: NOISE_AND_IMAGE}.get(read, f"{read} in, {returned} out")
    image_keys = sum(config.get(key) is not None for key in ("added_kv_proj_dim", "image_dim"))
    context = (TEXT, "only one of added_kv_proj_dim and image_dim", TEXT_AND_IMAGE)[image_keys]
    expand, boundary = bool(index.get("expand_timesteps")), index.get("boundary_ratio") is not None
    return _structure(index["_class_name"], len(experts), boundary, expand, channels, context)


def _structure(pipeline: str, experts: int, boundary: bool, expand: bool, channels: str, context: str) -> str:
    parts = [pipeline, f"{experts} expert{'s' if experts > 1 else ''}", f"{'a' if boundary else 'no'} boundary_ratio"]
    parts += ["expand_timesteps"] if expand else []
    return ", ".join([*parts, f"channels: {channels}", f"context: {context}"])


def recognise(structure: str, width: int) -> Variant | None:
    """The variant of a directory: by structure, and among those of one structure the one nearest in width."""
    fitting = [variant for variant in VARIANTS.values() if structure in variant.structures]
    return min(fitting, key=lambda variant: abs(variant.heads * variant.head_dim - width), default=None)
