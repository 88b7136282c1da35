"""Prompts: every file format users have, the pictures they start from, and leaving out what another file has too.

The lower layer that calibration and generation share. No torch, and nothing heavy until pixels are asked for.
"""

from ptq.prompts.images import RESIZE_POLICY, fit_image, load_image
from ptq.prompts.locate import require_media
from ptq.prompts.reader import PromptScan, make_sample, read_prompts
from ptq.prompts.sample import MediaRef, PromptSet, Sample, caption_digest, unit_seed
from ptq.prompts.survey import Survey, survey

__all__ = [
    "RESIZE_POLICY",
    "MediaRef",
    "PromptScan",
    "PromptSet",
    "Sample",
    "Survey",
    "caption_digest",
    "fit_image",
    "load_image",
    "make_sample",
    "read_prompts",
    "require_media",
    "survey",
    "unit_seed",
]
