"""Builds the two packages of one distribution, and the CPU kernels of ``csrc/`` as a plain shared library.

The library knows neither torch nor Python, so that one wheel serves every version of both. ``R2M_NATIVE=off`` builds
without it, for any machine; ``require`` fails where it cannot be built; ``auto`` (the default) builds it on Linux, and
goes on without it where that fails: the portable torch backend does the work. The compiler is ``$CXX``, or else
``c++``; for another machine it is a cross compiler, and ``$_PYTHON_HOST_PLATFORM`` says which (``linux-aarch64``).
"""

from __future__ import annotations

import os
import re
import shlex
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

LIBRARY = "r2m_kernels._native.libr2m_native"
FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-Wall", "-Wextra", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    # Products may be fused with sums, which rounds once less; nothing else of IEEE arithmetic is given up.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
]
SYSTEM, _, MACHINE = sysconfig.get_platform().partition("-")
# Every variant is compiled for its own instructions, and chosen by what the CPU at hand has.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
VARIANTS = {
    "x86_64": {
        "kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
        "kernels_avx512.cpp": AVX512,
        "kernels_bfloat16.cpp": [*AVX512, "-mavx512bf16"],
    },
    "aarch64": {"kernels_neon.cpp": []},
}.get(MACHINE, {})
HAS_VARIANTS = {"x86_64": ["-DR2M_X86"], "aarch64": ["-DR2M_ARM"]}.get(MACHINE, [])
SANITIZERS = ["-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
PLAIN = ["r2m_native.cpp", "kernels_portable.cpp"]
HEADERS = ["r2m_native.h", "variants.h", "kernels.h", "workspace.h", "convert.h", "merged.h", "elements.h"]

wish = os.environ.get("R2M_NATIVE", "auto")
if wish not in ("auto", "require", "off"):
    raise SystemExit(f"R2M_NATIVE: expected auto, require or off, got '{wish}'")
if wish == "auto" and SYSTEM != "linux":
    wish = "off"


class BuildLibrary(build_ext):
    """Compiles ``csrc/`` with ``$CXX``: a library without Python's name mangling, flags or headers."""

    user_options: ClassVar = [*build_ext.user_options, ("sanitize", None, "for tests: with AddressSanitizer and UBSan")]
    boolean_options: ClassVar = [*build_ext.boolean_options, "sanitize"]

    def initialize_options(self) -> None:
        """Without sanitizers."""
        super().initialize_options()
        self.sanitize = False

    def get_ext_filename(self, fullname: str) -> str:
        """Its path under the packages' root."""
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Every source with the flags of its variant, then the library."""
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        extra = SANITIZERS if self.sanitize else []
        target = Path(self.get_ext_fullpath(ext.name))
        objects = []
        for source in ext.sources:
            name = Path(source).name
            target_object = Path(self.build_temp) / Path(name).with_suffix(".o")
            objects.append(str(target_object))
            self.mkpath(self.build_temp)
            flags = [*FLAGS, *HAS_VARIANTS, *VARIANTS.get(name, []), *extra]
            self._run([*compiler, *flags, "-c", source, "-o", str(target_object)])
        self.mkpath(str(target.parent))
        self._run([*compiler, "-shared", *extra, *objects, "-o", str(target)])

    def _run(self, command: list[str]) -> None:
        try:
            self.spawn(command)
        except (ExecError, PlatformError, OSError) as error:
            raise CCompilerError(f"csrc could not be compiled ({error}); R2M_NATIVE=off builds without it") from None


class Wheel(bdist_wheel):
    """A wheel for any Python, and for any machine where nothing was compiled."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI, platform."""
        return ("py3", "none", super().get_tag()[2])


def described(readme: str) -> str:
    """README as an index shows it, where links into the repository would lead nowhere: pictures go, texts stay.

    The repository has no address yet; with one, these links would be its.
    """
    inside = r"\((?!\w+://|#)[^)\s]+\)"
    return re.sub(rf"\[([^\]]*)\]{inside}", r"\1", re.sub(rf"!\[[^\]]*\]{inside}\n*", "", readme))


sources = [f"csrc/{name}" for name in [*PLAIN, *VARIANTS]]
library = Extension(LIBRARY, sources, depends=[f"csrc/{name}" for name in HEADERS], optional=wish == "auto")

setup(
    long_description=described((Path(__file__).parent / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["r2m_kernels", "r2m_kernels.*"])
    + find_packages("python", include=["r2m", "r2m.*"]),
    package_dir={"r2m_kernels": "r2m_kernels", "r2m": "python/r2m"},
    package_data={
        "r2m_kernels": ["py.typed", "README.md", "_triton/launch.json"],
        "r2m": ["py.typed", "templates/*", "plugins/fusion_bench/method/*.yaml"],
    },
    ext_modules=[] if wish == "off" else [library],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
