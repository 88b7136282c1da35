"""Presets: the published defaults of each variant, what the command line changes, and what follows from the size."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptq.config import CONFIGS, list_configs
from ptq.config.load import validate
from ptq.errors import UsageError
from ptq.wan.layout import ModelLayout, read_layout
from ptq.wan.presets import ModelPreset, load_preset
from ptq.wan.variants import VARIANTS

PUBLISHED = {
    "T2V-A14B": (40, 12.0, 4.0, 3.0, 81, 16),
    "I2V-A14B": (40, 5.0, 3.5, 3.5, 81, 16),
    "TI2V-5B": (50, 5.0, 5.0, None, 121, 24),
    "T2V-1.3B": (50, 3.0, 5.0, None, 81, 16),
    "T2V-14B": (50, 3.0, 5.0, None, 81, 16),
    "I2V-14B": (50, 3.0, 5.0, None, 81, 16),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_hold_the_published_defaults(name: str) -> None:
    p, variant = load_preset(name), VARIANTS[name]
    found = (p.steps, p.flow_shift, p.guidance_scale, p.guidance_scale_2, p.num_frames, p.fps)
    assert found == PUBLISHED[name]
    assert p.variant == name and p.hub_id == variant.hub_ids[0] and variant.release.replace(" ", "") in p.hub_id
    assert p.max_sequence_length == 512 and p.negative_prompt
    stride = 32 if name == "TI2V-5B" else 16
    assert p.height % stride == 0 == p.width % stride and p.num_frames % 4 == 1
    assert (p.guidance_scale_2 is None) == (len(variant.experts) == 1)
    assert variant.flow_shift(p.height, p.width) in (None, p.flow_shift)


def test_every_variant_has_a_preset_and_every_preset_a_variant() -> None:
    assert set(PUBLISHED) == set(VARIANTS)
    assert list_configs("models") == sorted(name.lower() for name in VARIANTS) and CONFIGS.is_dir()


def test_unknown_variant_and_unknown_key() -> None:
    with pytest.raises(UsageError, match=r"Unknown variant 'A14B'.*T2V-A14B"):
        load_preset("A14B")
    value = load_preset("TI2V-5B").model_dump()
    with pytest.raises(UsageError, match=r"here: stepz.*did you mean steps.*Known keys: variant"):
        validate(ModelPreset, value | {"stepz": 3}, "here")
    with pytest.raises(UsageError, match="height"):
        validate(ModelPreset, value | {"height": 0}, "here")
    with pytest.raises(UsageError, match=r"variant.*one of T2V-A14B.*found 'A14B'"):
        validate(ModelPreset, value | {"variant": "A14B"}, "here")


def of(name: str, path: Path, **changes: object) -> ModelLayout:
    """The layout of a small model of a variant with the released preset, some of it changed."""
    layout = read_layout(path)
    return ModelLayout(
        layout.path,
        layout.variant,
        layout.experts,
        layout.pipeline_class,
        load_preset(name).model_copy(update=changes),
        layout.boundary_ratio,
    )


@pytest.mark.parametrize(
    ("given", "shift"),
    [
        ({}, 3.0),
        ({"height": 480, "width": 832}, 3.0),
        ({"height": 720, "width": 1280}, 5.0),
        ({"height": 1280, "width": 720}, 5.0),
        ({"height": 720, "width": 1280, "flow_shift": 4.5}, 4.5),
        ({"flow_shift": 8.0}, 8.0),
    ],
)
def test_flow_shift_of_wan_21_follows_the_size(random_pipelines, capsys, given: dict, shift: float) -> None:
    assert of("T2V-14B", random_pipelines["T2V-14B"]).resolve_preset(**given).flow_shift == shift
    said = capsys.readouterr().err
    assert (f"Flow shift {shift:g}" in said) == ("flow_shift" not in given)


def test_flow_shift_of_an_own_preset_holds_at_its_own_size(random_pipelines) -> None:
    layout = of("T2V-14B", random_pipelines["T2V-14B"], flow_shift=4.0)
    assert layout.resolve_preset().flow_shift == 4.0
    assert layout.resolve_preset(height=720, width=1280).flow_shift == 5.0


def test_flow_shift_of_wan_22_is_the_same_at_every_size(random_pipelines, capsys) -> None:
    layout = of("T2V-A14B", random_pipelines["T2V-A14B"])
    capsys.readouterr()  # the pipeline may have been made just now, which shows its progress
    assert layout.resolve_preset(height=720, width=1280).flow_shift == 12.0 and not capsys.readouterr().err


def test_a_second_guidance_belongs_to_two_experts(random_pipelines) -> None:
    one, two = of("T2V-14B", random_pipelines["T2V-14B"]), of("T2V-A14B", random_pipelines["T2V-A14B"])
    assert one.resolve_preset().guidance_scale_2 is None and two.resolve_preset().guidance_scale_2 == 3.0
    with pytest.raises(UsageError, match="leave out --guidance-scale-2"):
        one.resolve_preset(guidance_scale_2=3.0)
    # A preset file may say it all the same: nobody asked for it then.
    told = of("T2V-14B", random_pipelines["T2V-14B"], guidance_scale_2=3.0)
    assert told.resolve_preset().guidance_scale_2 is None
    silent = of("T2V-A14B", random_pipelines["T2V-A14B"], guidance_scale_2=None)
    assert silent.resolve_preset(guidance_scale=2.5).guidance_scale_2 == 2.5


def test_a_model_that_reads_image_tokens_takes_512_text_tokens(random_pipelines) -> None:
    with pytest.raises(UsageError, match="exactly 512 text tokens, found 64"):
        of("I2V-14B", random_pipelines["I2V-14B"]).resolve_preset(max_sequence_length=64)


def test_starting_from_an_image(random_pipelines) -> None:
    policy = [(variant.image, read_layout(random_pipelines[name])) for name, variant in VARIANTS.items()]
    for image, layout in policy:
        assert layout.needs_image == layout.starts_from_image(False) == (image == "required")
        if image == "none":
            with pytest.raises(UsageError, match="cannot start from an image"):
                layout.starts_from_image(True)
        else:
            assert layout.starts_from_image(True)
    assert {image for image, _ in policy} == {"none", "required", "optional"}
