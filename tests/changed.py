"""What of the checks a change can touch, and runs it: ``make test-changed BASE=COMMIT``.

A test file is run where it is changed itself, or where a module that it reaches by imports is; what is no Python, or is
loaded by name, is told in :data:`RULES`. In doubt more is run. Changed build files, and what all tests share, run
everything.
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
EVERYTHING = (
    "Makefile",
    "pyproject.toml",
    "setup.py",
    "requirements.txt",
    "MANIFEST.in",
    ".ci/*",
    "tests/conftest.py",
    "tests/support/*",
)
# Globs of changed files → goals of the Makefile, and tests that take their slow cases along.
RULES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "r2m_kernels/_triton/*": (("kernels", "gpu-rehearsal"), ("tests/kernels/test_triton_*.py",)),
    "bench/compile_check.py": (("kernels",), ("tests/bench/test_compile_check.py",)),
    "bench/gpu/*": (("gpu-rehearsal",), ()),
    "tests/gpu/*": (("gpu-rehearsal",), ()),
    "csrc/*": (("sanitize",), ("tests/kernels/test_native.py", "tests/test_package.py")),
    "r2m_kernels/_native/*": (("sanitize",), ("tests/kernels/test_native.py",)),
    "python/r2m/demo/*": ((), ("tests/demo/*.py", "tests/bench/test_quality.py", "tests/bench/test_pretrained.py")),
    "bench/quality/*": ((), ("tests/bench/test_quality.py", "tests/bench/test_pretrained.py")),
    "python/r2m/checkpoints/*": (("zoo",), ("tests/r2m/test_zoo.py", "tests/r2m/test_hostile.py")),
    "python/r2m/arrangement.py": (("zoo",), ("tests/r2m/test_zoo.py",)),
    "python/r2m/presets.py": (("zoo",), ("tests/r2m/test_zoo.py",)),
    "python/r2m/adapted.py": (("zoo",), ("tests/r2m/test_adapted.py",)),
    "python/r2m/plugins/*": ((), ("tests/r2m/test_plugins.py",)),
    "docs/adapters.md": (("zoo",), ("tests/r2m/test_adapters_page.py",)),
    "r2m_kernels/*": ((), ("tests/bench/test_same_bits.py",)),
    "*.md": (
        (),
        (
            *("tests/r2m/test_manual.py", "tests/r2m/test_tutorial.py", "tests/r2m/test_own_methods.py"),
            *("tests/r2m/test_python_page.py", "tests/test_pages.py", "tests/bench/*.py", "tests/test_package.py"),
        ),
    ),
    "bench/results/*": ((), ("tests/bench/*.py",)),
    "bench/release/*": ((), ("tests/test_package.py",)),
    "bench/release/compiled.py": ((), ("tests/kernels/test_ahead.py",)),
    "bench/release/hub*": (("zoo",), ("tests/r2m/test_hub_kernel.py",)),
    "CITATION.cff": ((), ("tests/test_package.py",)),
}
# Imports by name, which nobody sees in the source: who loads what.
BY_NAME = {"r2m_kernels._backends": ("r2m_kernels._torch", "r2m_kernels._native", "r2m_kernels._triton")}
COMMAND = "r2m.commands.main"  # what a test of the application starts in a process reaches at least this


@dataclass
class Selection:
    """What is to be run: goals of the Makefile, test files, and those whose slow cases come along."""

    everything: bool = False
    goals: set[str] = field(default_factory=set)
    tests: set[str] = field(default_factory=set)
    slow: set[str] = field(default_factory=set)

    def commands(self) -> list[list[str]]:
        """As they are run, one after the other."""
        if self.everything:
            return [["make", "test"], ["make", "test-all"]]
        pytest = [sys.executable, "-m", "pytest", "-n", "2", "--timeout", "1800"]
        commands = [["make", *sorted({"check", *self.goals})]]
        if fast := sorted(self.tests - self.slow):
            commands.append([*pytest, "-m", "not slow", *fast])
        if self.slow:
            commands.append([*pytest, *sorted(self.slow)])
        return commands


def select(changed: list[str]) -> Selection:
    """What the change of these files, relative to the root, can touch."""
    selection = Selection(any(fnmatch.fnmatch(name, glob) for name in changed for glob in EVERYTHING))
    if selection.everything or not changed:
        return selection
    for name in changed:
        for glob, (goals, tests) in RULES.items():
            if fnmatch.fnmatch(name, glob):
                selection.goals.update(goals)
                selection.slow.update(str(path.relative_to(ROOT)) for test in tests for path in ROOT.glob(test))
    modules = {_module(name) for name in changed if name.endswith(".py")}
    graph = _imports()
    touched = modules.union(*(graph.find_downstream_modules(one) for one in modules & graph.modules))
    for test in ROOT.glob("tests/**/test_*.py"):
        path = str(test.relative_to(ROOT))
        if path in changed or _reached(test) & touched:
            selection.tests.add(path)
    selection.tests -= {path for path in selection.tests if path.startswith("tests/gpu/")}  # those are rehearsed
    selection.slow = {path for path in selection.slow if Path(path).name.startswith("test_")}
    return selection


@functools.cache
def _imports() -> grimp.ImportGraph:
    """Who imports whom in the packages, those loaded by name included."""
    graph = grimp.build_graph("r2m_kernels", "r2m", "bench", cache_dir=None)
    for importer, loaded in BY_NAME.items():
        for module in loaded:
            graph.add_import(importer=importer, imported=module)
    return graph


def _module(name: str) -> str:
    """A file's module; of a file of the tests its name, by which others beside it import it."""
    if name.startswith("tests/"):
        return Path(name).stem
    return ".".join(Path(name.removeprefix("python/")).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def _reached(test: Path) -> set[str]:
    """Modules that a test file imports, and those that tests beside it do that it imports."""
    reached: set[str] = {COMMAND} if test.parent.name == "r2m" else set()
    reached.add("conftest")
    waiting, seen = [test], set()
    while waiting:
        file = waiting.pop()
        seen.add(file)
        for node in ast.walk(ast.parse(file.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            reached.update(names)
            beside = [
                ROOT / "tests" / folder / f"{name}.py"
                for name in names
                for folder in ("kernels", "support", test.parent.name)
            ]
            waiting += [path for path in beside if path.is_file() and path not in seen]
    return reached


def main(base: str) -> int:
    """Run what the change since ``base`` can touch, uncommitted files included."""
    listed = [["git", "diff", "--name-only", base], ["git", "ls-files", "--others", "--exclude-standard"]]
    changed = [line for one in listed for line in subprocess.check_output(one, text=True, cwd=ROOT).splitlines()]
    commands = select(changed).commands() if changed else []
    print(f"{len(changed)} files changed since {base}; {len(commands)} commands", flush=True)
    for command in commands:
        print("$", *command, flush=True)
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code not in (0, 5):  # 5: all cases of these files are slow ones
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
