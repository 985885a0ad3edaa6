"""Nano: procedural portraits, and every network of the pipeline, small, trained on them."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
