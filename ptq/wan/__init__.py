"""Everything that knows Wan 2.2: module names, experts, variants, block inputs, and where models come from."""
