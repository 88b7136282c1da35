"""Stages of scripts/train_tiny.py. Not part of the installed package."""
