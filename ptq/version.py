"""The package version, in one place.

Part of what an unfinished checkpoint and a run of videos are made from: another version does not go on with them.
"""

__version__ = "0.2.0"
