"""Losses as values."""
