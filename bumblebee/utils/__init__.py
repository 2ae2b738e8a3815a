"""Helpers without torch that any module may import."""
