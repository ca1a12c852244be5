"""The data's way: sources, extents, the ring of slots."""
