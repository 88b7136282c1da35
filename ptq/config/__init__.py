"""Strict configuration: recipes and model presets, read from YAML, unknown keys are errors."""

from ptq.config.load import CONFIGS, list_configs, load_yaml
from ptq.config.preset import ModelPreset, load_preset
from ptq.config.recipe import Recipe, load_recipe

__all__ = ["CONFIGS", "ModelPreset", "Recipe", "list_configs", "load_preset", "load_recipe", "load_yaml"]
