"""Whole training steps of real model shapes: what `bench.end_to_end` runs."""
