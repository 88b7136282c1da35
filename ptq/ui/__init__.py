"""What the user sees while work runs: messages and progress with time left.

Rich live display on a terminal, plain lines otherwise (a log file gets a line at most every few seconds). Stages call
`info`, `warn` and `progress`; they never print.
"""

from ptq.ui.clean import clean, clean_json
from ptq.ui.console import console, details, error, info, plain, say, stderr, table, warn
from ptq.ui.progress import Progress, format_bytes, format_seconds, progress, shorten

__all__ = [
    "Progress",
    "clean",
    "clean_json",
    "console",
    "details",
    "error",
    "format_bytes",
    "format_seconds",
    "info",
    "plain",
    "progress",
    "say",
    "shorten",
    "stderr",
    "table",
    "warn",
]
