"""The parts of scripts/compare_checkouts.py: jobs, what they read, the process that runs them, what differs."""
