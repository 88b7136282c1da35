"""LoRA on a packed Wan checkpoint: diffusers' own calls, the codes stay as they are.

ptq demo --format hif4 --units 2        # makes demo-out/hif4, a packed checkpoint of the embedded model
pip install "wan-ptq[lora]"
python examples/lora.py demo-out/hif4 high_noise.safetensors low_noise.safetensors "a red ring moves left"
"""

import sys

import torch

import ptq

directory, high_noise, low_noise, prompt = sys.argv[1:5]
pipe = ptq.load_pipeline(directory)
settings = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4, "max_sequence_length": 64}


def latents():
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, generator=generator, output_type="latent", **settings).frames


before = latents()
pipe.load_lora_weights(high_noise, adapter_name="style")
pipe.load_lora_weights(low_noise, adapter_name="style", load_into_transformer_2=True)
for strength in (0.5, 1.0):
    pipe.set_adapters("style", strength)
    print(f"strength {strength}: latents move by {(latents() - before).abs().mean():.3f}")

pipe.unload_lora_weights()
print(f"unloaded: the same latents as before: {torch.equal(latents(), before)}")
