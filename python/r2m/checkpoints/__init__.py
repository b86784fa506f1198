"""Checkpoints on disk: the only place that opens, lays out or writes their files."""
