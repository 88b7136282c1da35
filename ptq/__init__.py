"""W4A4 post-training quantization for Wan 2.2."""
