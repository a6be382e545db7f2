"""All contestants by name."""

from __future__ import annotations

from bench.contestants import BASELINES, OURS, OURS_BACKENDS, OURS_SMALL, PRODUCTS
from bench.peers import PEERS
from bench.preferences import OURS_PREFERENCES, PREFERENCES

CONTESTANTS = {
    c.name: c
    for c in (
        PRODUCTS,
        *BASELINES,
        *OURS,
        *OURS_BACKENDS,
        *OURS_SMALL,
        *OURS_PREFERENCES,
        *PREFERENCES,
        *PEERS,
    )
}


def families(names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Group contestants by the process they share; each group is headed by the bare products, its yardstick."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if name != "products":
            groups.setdefault(CONTESTANTS[name].family, ["products"]).append(name)
    return {family: tuple(members) for family, members in groups.items()}
