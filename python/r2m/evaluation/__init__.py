"""How well detectors detect: ``r2m evaluate``."""
