"""Is this version right and fast on this GPU? ``python -m bench.gpu``; see ``__main__.py``."""
