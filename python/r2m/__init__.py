"""The application around :mod:`r2m_kernels`: checkpoint files, the command ``r2m``, its demo.

>>> from r2m import Expert, Recipe, merge_files
>>> experts = {"fs": Expert("fs.pth"), "fr": Expert("hf://me/fr")}
>>> report = merge_files(Recipe("base.safetensors", experts), "merged")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from r2m.merge import merge_files as merge_files
    from r2m.merge import plan_merge as plan_merge
    from r2m.options import Options as Options
    from r2m.recipe import Expert as Expert
    from r2m.recipe import Recipe as Recipe
    from r2m.recipe_file import read_recipe as read_recipe

# Loaded when they are asked for: not every use needs torch.
_HOMES = {
    "merge_files": "r2m.merge",
    "plan_merge": "r2m.merge",
    "Expert": "r2m.recipe",
    "Recipe": "r2m.recipe",
    "read_recipe": "r2m.recipe_file",
    "Options": "r2m.options",
}

__all__ = ["Expert", "Options", "Recipe", "merge_files", "plan_merge", "read_recipe"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
