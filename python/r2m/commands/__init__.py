"""The command ``r2m``: options in, exit code out."""
