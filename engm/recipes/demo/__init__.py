"""``engm demo``: robust digits, trained with several outer optimizers side by side in a few minutes."""

from .settings import DemoSettings, Training, default_alpha, demo_training
from .side_by_side import Demo, MethodRun, prepare, run

__all__ = ["Demo", "DemoSettings", "MethodRun", "Training", "default_alpha", "demo_training", "prepare", "run"]
