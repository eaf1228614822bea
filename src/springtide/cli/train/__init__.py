"""``springtide train``."""
