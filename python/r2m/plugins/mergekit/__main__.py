"""``python -m r2m.plugins.mergekit CONFIG OUT …``: mergekit's own command ``mergekit-yaml`` with our methods in it.

It looks for methods in no other package: somebody has to register them before it starts.
"""

from mergekit.scripts.run_yaml import main

from r2m.plugins.mergekit import register_all

register_all()
main(prog_name="mergekit-yaml")
