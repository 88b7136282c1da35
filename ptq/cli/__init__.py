"""The command line: one file a command. Parse, call one stage, show the result; no numerics, no model code."""
