"""The side that owns data or has a private task."""
