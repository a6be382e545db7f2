"""``python -m slime_fused.trainer`` is ``slime-train``."""

from slime_fused.trainer.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
