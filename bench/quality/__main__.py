"""``python -m bench.quality``: see ``run``, which is a module of its own because processes must find its functions."""

from bench.quality.run import main

if __name__ == "__main__":
    raise SystemExit(main())
