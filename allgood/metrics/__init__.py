"""Metrics room: anomaly maps, masks and image scores in, numbers with guaranteed bounds out.

`reference` holds the variants of published evaluation codes, for comparison with their tables.
"""

from allgood.metrics.images import image_curves, image_f1max_threshold, image_metrics
from allgood.metrics.pixels import PixelState
from allgood.metrics.ranking import MAD_METRICS, Metric, mad, mean_over_categories

__all__ = [
    "MAD_METRICS",
    "Metric",
    "PixelState",
    "image_curves",
    "image_f1max_threshold",
    "image_metrics",
    "mad",
    "mean_over_categories",
]
