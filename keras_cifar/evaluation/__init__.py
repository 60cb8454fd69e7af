"""What a model gets right: metrics, calibration, robustness, explanations, plots."""
