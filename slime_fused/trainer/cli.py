"""``slime-train``: train a model from the command line. Loads the libraries only for what is more than help."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``slime-train`` with ``argv``; returns the exit status: 0, or 2 for input that cannot be used."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or {"-h", "--help"} & set(arguments):
        from slime_fused.trainer.quick_help import short_help

        print(short_help(arguments))
        return 0
    if {"--help_all", "--help-all"} & set(arguments):
        from slime_fused.trainer.arguments import full_help

        print(full_help(arguments))
        return 0
    from slime_fused.trainer.run import run

    return run(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
