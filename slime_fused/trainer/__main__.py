"""``python -m slime_fused.trainer`` is ``slime-train``."""

from slime_fused.trainer.cli import main

raise SystemExit(main())
