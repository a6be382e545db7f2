"""Names for losses, so that an operator's schema, which holds no objects, can carry one."""

from __future__ import annotations
