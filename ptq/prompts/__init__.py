"""Prompts: every file format users have, the pictures they start from, and the check that two sets are disjoint.

The lower layer that calibration and generation share. No torch, and nothing heavy until pixels are asked for.
"""

from ptq.prompts.disjoint import Overlap, caption_digest, check_disjoint, find_overlaps
from ptq.prompts.formats import FORMAT_NAMES
from ptq.prompts.images import RESIZE_POLICY, fit_image, load_image
from ptq.prompts.locate import describe_missing, require_media
from ptq.prompts.reader import PromptScan, read_prompts
from ptq.prompts.sample import MediaRef, PromptSet, Sample
from ptq.prompts.survey import Survey, survey

__all__ = [
    "FORMAT_NAMES",
    "RESIZE_POLICY",
    "MediaRef",
    "Overlap",
    "PromptScan",
    "PromptSet",
    "Sample",
    "Survey",
    "caption_digest",
    "check_disjoint",
    "describe_missing",
    "find_overlaps",
    "fit_image",
    "load_image",
    "read_prompts",
    "require_media",
    "survey",
]
