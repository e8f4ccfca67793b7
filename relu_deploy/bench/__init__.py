"""Measure engines against their original: isolated processes, interleaved rounds, an interval on the ratio."""
