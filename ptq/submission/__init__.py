"""The submission: a deterministic archive of everything a reviewer needs, and the checks that a reviewer runs."""
