"""The run directory and its tables."""
