"""Quantization: calibration, methods, export, and what they cost in quality."""
