"""``engm demo``: robust digits, trained with several outer optimizers side by side in a few minutes."""

from .side_by_side import Demo, DemoSettings, MethodRun, default_alpha, demo_training, prepare, run

__all__ = ["Demo", "DemoSettings", "MethodRun", "default_alpha", "demo_training", "prepare", "run"]
