"""From prompts to recorded denoiser inputs: which steps, how they are captured, how they lie on disk."""
