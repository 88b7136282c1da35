"""The packed checkpoint on disk: layout, reader, writer, manifest, and the quantizer with which diffusers loads it."""
