"""The model family, Wan 2.2 and 2.1: variants, presets, names inside a block, running one block, decoding, where models come from.

Everything outside asks `layout.ModelLayout` (what a directory holds), `pipeline` (a diffusers pipeline in use) and
`replay.ExpertReplay` (one expert, block by block); only this folder knows names of modules, experts and variants.
"""
