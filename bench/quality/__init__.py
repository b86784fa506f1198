"""Does the merge detect? Detectors trained, merged by every method, and judged on forgeries none has seen."""
