"""What a report shows -> what metrics.json holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from allgood.evaluation.content import CategoryResult, Parts, ReportContent
    from allgood.metrics import Metric


def numbers(content: ReportContent, pixel_size: int) -> dict[str, Any]:
    """The content of metrics.json; `pixel_size` 0 stands for each picture's own size."""
    assert content.pooled is not None
    return {
        "protocol": content.protocol,
        "pixel_size": pixel_size or "own",
        "categories": {result.name: _json(result.metrics) for result in content.categories},
        "mean": _json(content.mean),
        "pooled": _json(content.pooled.metrics),
        **_parts_json(content.parts),
        "alarms": {
            **{result.name: _alarms_json(result) for result in content.categories},
            "pooled": _alarms_json(content.pooled),
        },
        "unreadable": [[picture.path, picture.reason] for picture in content.unreadable],
        "test_data_fingerprint": content.facts["test data fingerprint"],
    }


def _json(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    return {name: metric.to_json() for name, metric in metrics.items()}


def _parts_json(parts: Parts | None) -> dict[str, Any]:
    """Under `parts`: the filter's share, and the metrics of detector and filter alone."""
    if parts is None:
        return {}
    from allgood.metrics import mean_over_categories

    of: dict[str, Any] = {"fusion": parts.fusion}
    for name, results in (("host", parts.host), ("filter", parts.filter)):
        of[name] = {
            "categories": {result.name: _json(result.metrics) for result in results},
            "mean": _json(mean_over_categories({r.name: dict(r.metrics) for r in results})),
        }
    return {"parts": of}


def _alarms_json(result: CategoryResult) -> dict[str, Any] | None:
    if result.alarms is None:
        return None
    return {
        "threshold": result.alarms.threshold,
        "promised_false_alarm_rate": result.alarms.alpha,
        "found": result.alarms.num_found,
        "defective": result.num_defective,
        "false_alarms": result.alarms.num_false_alarms,
        "good": result.num_good,
    }
