"""What the paper's figures look at: statistics of gradients, norms against norms, loss landscapes."""

from .correlation import NormCorrelation, norm_correlation
from .gradients import GradientStatistics, gradient_statistics
from .landscape import Landscape, level_sets, loss_landscape, roughness

__all__ = [
    "GradientStatistics",
    "Landscape",
    "NormCorrelation",
    "gradient_statistics",
    "level_sets",
    "loss_landscape",
    "norm_correlation",
    "roughness",
]
