"""Checkpoints: folders that are whole and verified, or do not exist. docs/checkpoints.md tells the format."""
