"""A merge as a page to look at: ``r2m report``."""
