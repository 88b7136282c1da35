"""Strict configuration: recipes, read from YAML; unknown keys are errors. Presets of models are in `ptq.wan.presets`."""

from ptq.config.load import CONFIGS, list_configs, load_yaml
from ptq.config.recipe import Recipe, installed_recipes, load_recipe

__all__ = ["CONFIGS", "Recipe", "installed_recipes", "list_configs", "load_recipe", "load_yaml"]
