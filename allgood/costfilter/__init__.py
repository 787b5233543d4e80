"""Room 4: Match -> cost volume -> 3-D U-Net -> refined map; knows no detector.

Paper: Zhang et al., "CostFilter-AD", ICML 2025: anomaly detection as the filtering of a matching
cost volume.
"""
