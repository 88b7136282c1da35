"""From recorded inputs to 4-bit codes: block replay, the resumable run, and `quantize_module` for any model."""
