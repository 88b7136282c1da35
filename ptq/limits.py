"""How much of foreign input is read: bytes, depth, counts. Each limit stands here once, far above what real files have."""

JSON_BYTES = 32 << 20
"""One JSON file that is read whole; a VBench result of 75,000 rows has 15 MB."""
JSON_DEPTH = 64
"""Lists and objects inside each other, in JSON of every kind, prompt files among them."""
JSON_VALUES = 2_000_000
"""Values of one JSON file or line that is read whole."""
JSON_DIGITS = 40
"""Digits of an integer; Python's own conversion takes time that grows with their square."""
LINE_BYTES = 8 << 20
"""One line of a file of lines."""
LINES_BYTES = 512 << 20
"""A JSONL artifact."""

PROMPT_RECORD_BYTES = 8 << 20
"""One record of a prompt file; a record of OpenS2V-5M with its annotations has some hundred kilobytes."""
PROMPT_RECORD_VALUES = 500_000
"""Values of one record of a prompt file."""
PROMPT_RECORDS = 20_000_000
"""Records of one prompt file."""
PROMPT_CHARS = 100_000
"""Characters of one text of a prompt file; the longest caption of the challenge has 1,929."""
ID_CHARS = 4096
"""Characters of a sample's id."""

YAML_BYTES = 16 << 10
"""One YAML file; a recipe has one kilobyte."""
YAML_DEPTH = 16
"""Groups inside each other."""

IMAGE_PIXELS = 64_000_000
"""Pixels of a picture or of a frame of a clip, before it is decoded; 8K video has 33 million."""
CLIP_FRAMES = 100_000
"""Frames that are decoded of a clip before the wanted one."""
