"""How much of foreign input is read: limits that end the work before it begins, each with the reason for its size.

Foreign is whatever somebody else may have written: archives, prompts, recipes, JSON. Honest files stay far below.
"""

JSON_BYTES = 32 << 20
"""One JSON file that is read whole; a VBench result of 75,000 rows has 15 MB."""
JSON_DEPTH = 64
"""Lists and objects inside each other, in JSON of every kind, prompt files among them."""
JSON_VALUES = 2_000_000
"""Values of one JSON file or line that is read whole."""
JSON_DIGITS = 40
"""Digits of an integer; Python's own conversion takes time that grows with their square."""
OWNER_BYTES = 64 << 10
"""A lock or a claim, which names a process."""
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

ARCHIVE_MEMBERS = 20_000
"""Files in a submission: weights and source are hundreds, two runs of a thousand shards each two thousand."""
ARCHIVE_NAME_BYTES = 1024
"""Name of a member; also the bytes of the extended header that carries a long one."""
ARCHIVE_RATIO = 200
"""Unpacked bytes for each byte of the archive: text compresses tenfold, packed weights hardly, zeros a thousandfold."""
ARCHIVE_SLACK_BYTES = 64 * 2**20
"""What a small archive may unpack to whatever its ratio."""
ARCHIVE_TEXT_BYTES = 64 * 2**20
"""A member that is read whole (JSON, YAML, text): manifests of ten thousand videos take 20 MB, a tokenizer 17."""
ARCHIVE_PADDING_BYTES = 2**20
"""Zeros after the last member; tar pads to 10 kB."""
RESAMPLES = 1_000_000
"""Bootstrap resamples that are computed again; intervals settle at ten thousand."""
VIDEO_STEPS = 1000
"""Denoising steps of a video that is generated again; schedules are trained with a thousand."""
VIDEO_PIXELS = 2**31
"""Pixels of a video (width x height x frames): 121 frames of 1280 x 704 are 109 million."""
MEASURED_PIXELS = 10**9
"""Pixels of an archive's videos that are measured again, some minutes on one core; units beyond are drawn from."""
CONFIG_NUMBER = 2**24
"""Any size in a component's config.json; the largest in use is a vocabulary of 256,384."""
