"""Which layers of a packed checkpoint lost most, and what the recipe gained there over plain rounding: read from its manifest.

python examples/worst_layers.py demo-out/hif4
"""

import sys

from ptq.checkpoint.manifest import read_manifest

manifest = read_manifest(sys.argv[1])
print(f"{manifest.variant} in {manifest.format}, recipe {manifest.recipe_name}")
for layer in sorted(manifest.layers, key=lambda one: -one.output_error)[:5]:
    gain = layer.output_error_rtn / layer.output_error
    print(
        f"  {layer.expert} block {layer.block} {layer.layer}: {layer.output_error:.2e}, {gain:.1f} times less than plain rounding"
    )
