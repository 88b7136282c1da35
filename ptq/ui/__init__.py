"""What the user sees while work runs: messages and progress with time left.

Rich live display on a terminal, plain lines otherwise (a log file gets a line at most every few seconds). Stages call
`info`, `warn` and `progress`; they never print. With `set_events(path)` every message and progress step is also
appended to a JSONL file for machines.
"""

from ptq.ui.console import console, facts, info, set_events, stderr, table, warn
from ptq.ui.progress import Progress, progress

__all__ = ["Progress", "console", "facts", "info", "progress", "set_events", "stderr", "table", "warn"]
