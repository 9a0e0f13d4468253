"""Everybody who is measured, each behind the same small interface."""
