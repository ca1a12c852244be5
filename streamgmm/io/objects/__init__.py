"""Zarr arrays in object stores: reaching them, reading ranges patiently, and keeping a part of them here."""
