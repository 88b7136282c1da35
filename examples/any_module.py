"""Quantize the Linears of any nn.Module to W4A4 and see what it cost: here a residual MLP with random weights.

python examples/any_module.py
"""

import copy

import torch

import ptq


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = torch.nn.LayerNorm(256), torch.nn.Linear(256, 1024), torch.nn.Linear(1024, 256)

    def forward(self, input):
        return input + self.down(torch.nn.functional.gelu(self.up(self.norm(input))))


torch.manual_seed(0)
model = torch.nn.Sequential(*(Block() for _ in range(4)))
original = copy.deepcopy(model)

# What the model sees in use, as keyword arguments of its forward: the statistics of the solver come from these.
batches = [{"input": torch.randn(4, 64, 256)} for _ in range(4)]
report = ptq.quantize_module(model, batches, format="hif4", recipe="hif4")

print(f"{len(report.layers)} Linears are W4A4; left alone: {len(report.skipped)}")
for name, why in report.skipped.items():
    print(f"  {name}: {why}")

unseen = torch.randn(4, 64, 256)
with torch.no_grad():
    expected, found = original(unseen), model(unseen)
error = (found - expected).square().sum() / expected.square().sum()
print(f"relative squared error on an input that was not calibrated on: {error:.2e}")
