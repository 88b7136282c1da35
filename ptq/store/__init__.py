"""Files that survive: atomic writes, digests, locks, shards of the work, and directories that can be resumed."""
