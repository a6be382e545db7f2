"""The output head of a `transformers` model: running a loss inside it, what follows it, and whether that is right.

What this package's own trainer and its integrations into other trainers share. Needs ``slime-fused[trainer]``.
"""
