"""Evaluation room: scores, maps and metrics of a test in; overlays, one table and one HTML page
out.
`content` says what a report holds, `report` and `table` render it, `overlay` paints heat maps."""
