"""Data sets in their formats on disk."""
