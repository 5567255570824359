"""Counts and byte offsets, the same in every process."""
