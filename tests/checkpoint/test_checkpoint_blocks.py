"""Learned blocks of 128 where K divides by it and of 64 elsewhere, from the recipe to the video; and of 64 only, as before."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from random_model import make_random_pipeline

from ptq.checkpoint.export import export_component
from ptq.checkpoint.manifest import read_manifest, verify_files
from ptq.report.method import describe_method
from ptq.runtime import QuantLinear
from ptq.store.files import read_json
from ptq.wan.loading import load_pipeline

WIDTH, FFN = 192, 256


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_random_pipeline(tmp_path_factory.mktemp("model") / "odd", "TI2V-5B", layers=1, width=WIDTH, ffn=FFN)


@pytest.mark.parametrize(("block", "sizes"), [(128, {WIDTH: 64, FFN: 128}), (64, {WIDTH: 64, FFN: 64})])
def test_each_layer_has_the_blocks_that_its_width_takes(model, tmp_path, quantize_with, generate, block, sizes):
    packed = quantize_with(model, tmp_path, "mxfp4", ("scheme.transform=learned", f"scheme.block={block}"), {})
    assert read_json(packed / "transformer/config.json")["quantization_config"]["transform"]["block_size"] == block
    pipe = load_pipeline(packed)
    layers = {name: layer for name, layer in pipe.transformer.named_modules() if isinstance(layer, QuantLinear)}
    assert {layer.in_features for layer in layers.values()} == set(sizes)
    generator, stored = torch.Generator().manual_seed(0), 0
    for layer in layers.values():
        k, size = layer.in_features, sizes[layer.in_features]
        assert layer.transform.shape == (k // size, size, size)
        stored += layer.transform.numel()
        # From the definition: the input times the block-diagonal matrix that is stored, on the grid, times the decoded weight.
        matrix = torch.block_diag(*layer.transform.view(torch.float8_e4m3fn).double() / 256)
        x = torch.randn(20, k, generator=generator)
        quantized = layer.scheme.format.fake_quantize((x.double() @ matrix).float(), scale_rule=layer.scheme.input_rule)
        y = quantized.double() @ layer.packed.decode().double().T + layer.bias.double()
        found = layer(x).double()
        # A sum within its last bit of a threshold may round to the other side.
        assert (found - y).norm() < 1e-3 * y.norm()
    manifest = verify_files(packed)
    coverage = manifest.coverage
    assert coverage.basis_bytes == stored
    assert coverage.bits_with_basis == pytest.approx(4.25 + 8 * stored / coverage.quantized_parameters)
    text = next(step.text for step in describe_method(manifest) if step.key == "learned")
    assert f"in blocks of {'128 and 64' if block == 128 else '64'} channels" in text
    assert torch.isfinite(generate(pipe)).all()
    export_component(packed / "transformer", tmp_path / "dense", "bf16")
    dense = WanTransformer3DModel.from_pretrained(tmp_path / "dense", dtype=torch.float32).state_dict()
    for name, layer in layers.items():
        assert torch.equal(dense[f"{name}.weight"], layer.dequantize().bfloat16().float())
    assert read_manifest(packed).recipe.scheme.block == block
