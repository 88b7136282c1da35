"""A scheme is one value in several forms: what is written is read back, and what does not fit together is refused."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ptq import known
from ptq.errors import PtqError
from ptq.scheme import (
    FORMATS,
    TRANSFORMS,
    Format,
    FormatError,
    Hadamard,
    HiF4,
    Learned,
    Scheme,
    Smoothed,
    Transform,
    get_format,
    get_transform,
    register_format,
    register_transform,
)
from ptq.scheme.hadamard import BLOCK_SIZES
from ptq.scheme.placement import DECODED
from ptq.scheme.tensors import with_sign
from ptq.scheme.transform import UNCHANGED

BLOCKS = {"none": (0,), "hadamard": BLOCK_SIZES, "smoothed": (0, *BLOCK_SIZES), "learned": (32, 64, 128)}
EVERY = [
    Scheme.of(name, transform=kind, block=block, input_rule=rule)
    for name, fmt in FORMATS.items()
    for kind, blocks in BLOCKS.items()
    for block in blocks
    for rule in fmt.scale_rules
    if kind != "learned" or block % fmt.group_size == 0
]
every = pytest.mark.parametrize("scheme", EVERY, ids=[one.key for one in EVERY])


def config(**changes: Any) -> dict[str, Any]:
    """A part of config.json as 0.1 wrote it, with changes of single keys ("transform.type")."""
    value: dict[str, Any] = {
        "format": "hif4",
        "weights": {"group_size": 64, "nibble_order": "low_first", "scale_layout": "hif4-pto-u32-v1"},
        "input_activations": {"format": "hif4", "dynamic": True, "scale_rule": "mse", "ties": "away"},
        "transform": {"type": "hadamard", "block_size": 64, "smooth": False},
    }
    for key, change in changes.items():
        group, _, name = key.rpartition("__")
        (value[group] if group else value)[name] = change
    return value


def test_every_kind_is_among_them() -> None:
    assert set(BLOCKS) == set(TRANSFORMS) and {one.transform.kind for one in EVERY} == set(TRANSFORMS)
    assert len({one.key for one in EVERY}) == len(EVERY) == len(set(EVERY))


@every
def test_config_round_trip(scheme: Scheme) -> None:
    written = json.loads(json.dumps(scheme.to_config()))
    assert written == scheme.to_config()
    assert Scheme.from_config(written, "config.json") == scheme


@every
def test_key_round_trip(scheme: Scheme) -> None:
    found = Scheme.from_key(scheme.key)
    assert found == scheme and found.key == scheme.key and type(found.transform) is type(scheme.transform)
    assert Scheme.from_key(scheme.key) is found  # an operator reads it at every call


@every
def test_copies_are_the_same_value_with_the_registered_format(scheme: Scheme) -> None:
    for twin in (copy.deepcopy(scheme), pickle.loads(pickle.dumps(scheme))):
        assert twin == scheme and hash(twin) == hash(scheme) and twin.format is scheme.format


@pytest.mark.parametrize(
    ("transform", "written"),
    [
        (UNCHANGED, {"type": "none", "block_size": 0, "smooth": False}),
        (Hadamard(64), {"type": "hadamard", "block_size": 64, "smooth": False}),
        (Smoothed(64), {"type": "hadamard", "block_size": 64, "smooth": True}),
        (Smoothed(0), {"type": "none", "block_size": 0, "smooth": True}),
        (Learned(128), {"type": "learned", "block_size": 128, "smooth": False}),
    ],
)
def test_config_is_what_earlier_versions_wrote(transform: Transform, written: dict[str, Any]) -> None:
    scheme = Scheme(get_format("hif4"), transform, "mse")
    assert scheme.to_config() == config(transform=written)
    assert Scheme.from_config(config(transform=written), "config.json") == scheme


def test_config_of_mxfp4_is_what_earlier_versions_wrote() -> None:
    value = {
        "format": "mxfp4",
        "weights": {"group_size": 32, "nibble_order": "low_first", "scale_layout": "e8m0-u8"},
        "input_activations": {"format": "mxfp4", "dynamic": True, "scale_rule": "qmax7.25", "ties": "even"},
        "transform": {"type": "learned", "block_size": 32, "smooth": False},
    }
    scheme = Scheme.of("mxfp4", transform="learned", block=32, input_rule="qmax7.25")
    assert scheme.to_config() == value and Scheme.from_config(value, "config.json") == scheme


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "nvfp4"}, "Unknown format 'nvfp4'; choose one of mxfp4, hif4"),
        ({"colour": "red"}, "colour: Extra"),
        ({"transform__size": 3}, r"transform\.size: Extra"),
        ({"transform": {"type": "none"}}, r"transform\.block_size: Field required; transform\.smooth: Field required"),
        ({"weights__group_size": 32}, "hif4 weights with group size 32 .* hif4 has 64 and hif4-pto-u32-v1"),
        ({"weights__scale_layout": "e8m0-u8"}, "layout e8m0-u8; hif4 has 64 and hif4-pto-u32-v1"),
        ({"weights__nibble_order": "high_first"}, r"weights\.nibble_order"),
        ({"input_activations__dynamic": False}, r"input_activations\.dynamic"),
        ({"input_activations__format": "mxfp4"}, "inputs in mxfp4 with weights in hif4.*cannot run"),
        ({"input_activations__scale_rule": "even"}, "the scale rule 'even'"),
        ({"input_activations__ties": "up"}, "the ties option 'up'"),
        (
            {"input_activations__ties": "even"},
            r"ties are rounded even; layers of this version round them away\. Quantize the model again",
        ),
        ({"transform__type": "awq"}, "Unknown transform 'awq'; choose one of none, hadamard, smoothed, learned"),
        ({"transform__type": "none"}, "a transform of type none with block size 64"),
        ({"transform__type": "smoothed"}, "a transform of type smoothed"),
        ({"transform__block_size": 0}, "a transform of type hadamard with block size 0"),
        ({"transform__block_size": 48}, "block size 48 is not supported"),
        ({"transform": {"type": "hadamard", "block_size": 48, "smooth": True}}, "block size 48 is not supported"),
        ({"transform": {"type": "learned", "block_size": 32, "smooth": False}}, "whole groups of 64"),
        (
            {"transform": {"type": "learned", "block_size": 64, "smooth": True}},
            "learned with a smoothing vector beside it",
        ),
        (
            {"input_activations__scale_rule": "max", "transform__type": "none"},
            "asks for the scale rule 'max' and for a transform of type none",
        ),
    ],
)
def test_wrong_configs_are_refused_with_the_file_named(changes: dict[str, Any], message: str) -> None:
    Scheme.from_config(config(), "there/config.json")
    with pytest.raises(PtqError, match=rf"^there/config\.json.*{message}"):
        Scheme.from_config(config(**changes), "there/config.json")


WRONG = [
    ("nvfp4", "none", 0, None, "Unknown format 'nvfp4'; choose one of mxfp4, hif4"),
    ("hif4", "awq", 64, None, "Unknown transform 'awq'; choose one of none, hadamard, smoothed, learned"),
    ("hif4", "hadamard", 0, None, "block size 0 is not supported; choose one of"),
    ("hif4", "hadamard", 48, None, "block size 48 is not supported"),
    ("mxfp4", "smoothed", 8, None, "block size 8 is not supported"),
    ("mxfp4", "learned", 0, None, "found blocks of 0"),
    ("mxfp4", "learned", 16, None, "whole groups of 32; found blocks of 16"),
    ("hif4", "learned", 32, None, "whole groups of 64; found blocks of 32"),
    ("hif4", "none", 0, "floor", "hif4 has no scale rule 'floor'; choose one of reference, mse"),
    ("mxfp4", "learned", 64, "reference", "mxfp4 has no scale rule 'reference'; choose one of floor, ceil"),
]


@pytest.mark.parametrize(("name", "kind", "block", "rule", "message"), WRONG)
def test_wrong_combinations_are_refused(name: str, kind: str, block: int, rule: str | None, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Scheme.of(name, transform=kind, block=block, input_rule=rule)
    known = rule or (FORMATS[name].scale_rules[0] if name in FORMATS else "floor")
    with pytest.raises(FormatError, match=message):
        Scheme.from_key(f"{name} {kind} {block} {known}")


@pytest.mark.parametrize("key", ["hif4", "hif4 none 0", "hif4 hadamard many reference", "hif4 none 0 mse away", ""])
def test_other_strings_are_no_keys(key: str) -> None:
    with pytest.raises(ValueError):
        Scheme.from_key(key)


def test_blocks_of_a_transform_given_directly_are_checked() -> None:
    with pytest.raises(FormatError, match="no blocks, found blocks of 64"):
        Scheme(get_format("hif4"), type(UNCHANGED)(64))
    with pytest.raises(FormatError, match="whole groups of 64"):
        Scheme(get_format("hif4"), Learned(32))


def test_none_has_no_blocks_whatever_a_recipe_says() -> None:
    assert Scheme.of("hif4", block=64) == Scheme.of("hif4") == Scheme(get_format("hif4"))
    assert Scheme.from_key("hif4 none 64 reference") == Scheme.of("hif4")


def test_the_default_rule_is_filled_in_and_is_the_same_scheme() -> None:
    for name, fmt in FORMATS.items():
        assert Scheme.of(name).input_rule == fmt.scale_rules[0]
        assert Scheme.of(name) == Scheme.of(name, input_rule=fmt.scale_rules[0])
        assert Scheme.of(name) != Scheme.of(name, input_rule="mse")


def test_kinds_with_the_same_blocks_are_different_schemes() -> None:
    found = {Scheme.of("mxfp4", transform=kind, block=64) for kind in TRANSFORMS}
    assert len(found) == len(TRANSFORMS) == 4


@every
def test_width_and_tensors(scheme: Scheme) -> None:
    fmt, transform = scheme.format, scheme.transform
    assert (
        scheme.multiple == fmt.group_size
    )  # no block is too large: where one does not divide K, a smaller one is taken
    k = 3 * fmt.group_size
    scheme.check_width(k)
    block = next((size for size in (128, 64, 32, 16) if size <= transform.block and k % size == 0), 0)
    assert transform.block_of(k) == block and scheme.unit(k) == max(fmt.group_size, block)
    with pytest.raises(FormatError, match=rf"K = {k + 16} is not a multiple of {scheme.multiple} \({fmt.name} groups"):
        scheme.check_width(k + 16)
    tensors = scheme.tensors(8, k)
    codes = fmt.pack(fmt.quantize(torch.ones(8, k)))
    expected = {
        name: (tuple(t.shape), t.dtype) for name, t in zip(("weight_packed", "weight_scale"), codes, strict=True)
    }
    basis = transform.plain(k)
    if basis is not None:
        expected[str(transform.tensor)] = (tuple(basis.shape), basis.dtype)
    assert tensors == expected
    assert scheme.basis_bytes(k) == (0 if basis is None else basis.numel() * basis.element_size())


def test_a_transform_of_ones_own_has_blocks_of_one_size() -> None:
    scheme = Scheme(get_format("mxfp4"), Reversed(48))
    assert scheme.multiple == scheme.unit(192) == 96
    with pytest.raises(
        FormatError, match=r"K = 128 is not a multiple of 96 .*transform reversed in blocks of a multiple of 48"
    ):
        scheme.check_width(128)


@every
def test_an_input_is_quantized_in_the_basis_by_the_rule(scheme: Scheme) -> None:
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    basis = scheme.transform.plain(256)
    changed = scheme.transform_input(x, basis)
    assert changed.dtype == torch.float32 and torch.equal(changed, scheme.transform.input(x.float(), basis))
    values = scheme.quantize_input(x, basis)
    assert values.dtype == torch.float32
    assert torch.equal(values, scheme.format.fake_quantize(changed, scale_rule=scheme.input_rule))


# A format and a transform of one's own.


@dataclass(frozen=True)
class Reversed(Transform):
    """Channels of a block in reverse."""

    kind = "reversed"

    def check(self, group_size: int) -> None:
        if self.block < 1:
            raise FormatError("Blocks of at least one channel are needed.")

    def input(self, x: Tensor, basis: Tensor | None) -> Tensor:
        return x.unflatten(-1, (-1, self.block)).flip(-1).flatten(-2)


class Int4(Format):
    """Whole numbers from -7 to 7 times a power of two, groups of 16: only what a format must have."""

    name = "int4"
    title = "INT4"
    description = "Whole numbers."
    group_size = 16
    bits_per_value = 4.5
    scale_dtype = torch.uint8
    scale_layout = "e8m0-u8"
    scale_rules = ("ceil", "floor")
    ties_options = ("even",)

    def steps(self, scales: Tensor) -> Tensor:
        return torch.exp2(scales.float() - 127.0).repeat_interleave(16, dim=-1)

    def levels(self, elements: Tensor) -> Tensor:
        magnitude = (elements & 7).float()
        return torch.where(elements >= 8, -magnitude, magnitude)

    def encode(self, x: Tensor, steps: Tensor) -> Tensor:
        return with_sign((x / steps).abs().round().clamp(max=7).to(torch.uint8), x)

    def quantize_columns(self, x_gn: Tensor, rule: str, ties: str) -> tuple[Tensor, Tensor]:
        exponent = torch.log2(x_gn.abs().amax(0).clamp(min=2.0**-100) / 7)
        scales = (exponent.ceil() if rule == "ceil" else exponent.floor()) + 127
        return self.encode(x_gn, torch.exp2(scales - 127)), scales.to(torch.uint8)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptq.scheme.transform.TRANSFORMS", dict(TRANSFORMS))
    monkeypatch.setattr("ptq.scheme.format.FORMATS", dict(FORMATS))
    monkeypatch.setattr("ptq.known.TRANSFORMS", dict(known.TRANSFORMS))
    monkeypatch.setattr("ptq.known.FORMATS", dict(known.FORMATS))
    register_transform(Reversed)
    register_format(Int4())


@pytest.mark.usefixtures("own")
def test_a_format_and_a_transform_of_ones_own_have_every_form() -> None:
    scheme = Scheme.of("int4", transform="reversed", block=4, input_rule="floor")
    assert scheme.transform == Reversed(4) and scheme.key == "int4 reversed 4 floor" and scheme.multiple == 16
    assert Scheme.from_config(json.loads(json.dumps(scheme.to_config())), "config.json") == scheme
    assert Scheme(get_format("int4"), get_transform("reversed", 4)).input_rule == "ceil"
    x = torch.arange(16.0).reshape(1, 16) - 8
    assert scheme.quantize_input(x, None).tolist() == [
        [*(-5.0, -6.0, -7.0, -7.0), *(-1.0, -2.0, -3.0, -4.0), *(3.0, 2.0, 1.0, 0.0), *(7.0, 6.0, 5.0, 4.0)]
    ]
    with pytest.raises(FormatError, match="at least one channel"):
        Scheme.of("int4", transform="reversed")


@pytest.mark.usefixtures("own")
def test_a_format_that_defines_only_what_it_must_has_the_rest_by_default() -> None:
    fmt, x = get_format("int4"), torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    codes = fmt.quantize(x)
    packed = fmt.quantize_and_pack(x)
    assert all(torch.equal(found, wanted) for found, wanted in zip(packed, fmt.pack(codes), strict=True))
    unpacked = fmt.unpack(*packed)
    assert torch.equal(unpacked.elements, codes.elements) and torch.equal(unpacked.scales, codes.scales)
    values = fmt.dequantize(codes)
    assert torch.equal(fmt.fake_quantize(x), values) and torch.equal(fmt.decode_packed(*packed), values)
    assert ((values - x).abs() <= fmt.steps(codes.scales) / 2).all()
    assert fmt.place(*packed) is DECODED and not fmt.exact_in_fp8(None) and not fmt.block_scaled
    assert fmt.packed_tensors(6, 64) == {
        "weight_packed": ((6, 32), torch.uint8),
        "weight_scale": ((6, 4), torch.uint8),
    }
    assert fmt.kernel_id is None and fmt.searched_scales is None
    with pytest.raises(FormatError, match=r"INT4 has no search of weight scales: set solver\.clip_search to false"):
        fmt.search_scales(x, None)


@pytest.mark.usefixtures("own")
def test_names_are_given_once() -> None:
    register_transform(Reversed)  # the same again is no error
    register_format(get_format("int4"))

    class Other(Reversed):
        """Another class with the same kind."""

    with pytest.raises(FormatError, match="a transform 'reversed' already"):
        register_transform(Other)
    with pytest.raises(FormatError, match="a format 'hif4' already"):
        register_format(HiF4())
    assert get_format("hif4") is FORMATS["hif4"] and get_transform("reversed", 2) == Reversed(2)
