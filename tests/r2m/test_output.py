"""What may be replaced, and that the output is there as a whole or not at all."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager as ContextManager
from pathlib import Path

import pytest
from r2m.output import PartialOutput, check_output, partial_output
from r2m.ownership import written
from r2m.records import REPORT, WRITTEN

from r2m_kernels import InvalidInput


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def former_output(name: str) -> Path:
    out = Path(name)
    out.mkdir(parents=True)
    (out / "model-00001-of-00002.safetensors").write_text("old")
    (out / "r2m_report.json").write_bytes(REPORT.text({WRITTEN: written(out)}))
    return out


def everything() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


def new(
    out: str | Path, *, overwrite: bool = False, resume: bool = False, **state: object
) -> ContextManager[PartialOutput]:
    return partial_output(out, overwrite=overwrite, resume=resume, state=state)


def test_a_new_directory_appears_with_its_parents() -> None:
    with new("a/b/out") as place:
        assert place.directory == Path("a/b/out.partial").resolve()
        assert not Path("a/b/out").exists()
        (place.output / "config.json").write_text("new")
    assert everything() == ["a", "a/b", "a/b/out", "a/b/out/config.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert Path("a/b/out").stat().st_mode & 0o777 == 0o777 & ~mask


def fill(out: str, *, folder: str = "", error: BaseException | None = None) -> None:
    """A new directory; on the way a folder of someone else appears, or an error."""
    with new(out) as place:
        (place.output / "config.json").write_text("new")
        if folder:
            Path(folder).mkdir()
        if error:
            raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_after_an_exception(error: type[BaseException]) -> None:
    Path("a").mkdir()
    with pytest.raises(error):
        fill("a/b/c/out", error=error())
    assert everything() == ["a"]


def test_a_parent_that_someone_uses_meanwhile_stays() -> None:
    with pytest.raises(ValueError, match="stop"):
        fill("a/out", folder="a/someone's", error=ValueError("stop"))
    assert everything() == ["a", "a/someone's"]


def test_a_former_output_is_replaced() -> None:
    out = former_output("a/out")
    check_output(out, overwrite=True, inputs=[])
    with new(out, overwrite=True) as place:
        (place.output / "config.json").write_text("new")
        assert (out / "r2m_report.json").exists()
    assert everything() == ["a", "a/out", "a/out/config.json"]


def test_a_former_output_is_put_back_when_the_new_one_cannot_be_moved_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = former_output("out")
    rename = os.rename

    def refuse(source: str | Path, target: str | Path) -> None:
        if str(source).endswith("out.partial/output"):
            raise OSError(5, "Input/output error", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    before = everything()
    with pytest.raises(OSError, match="Input/output") as caught, new(out, overwrite=True):
        pass
    assert everything() == before
    assert caught.value.filename == "out"


def test_an_output_that_appeared_meanwhile_is_not_replaced() -> None:
    with pytest.raises(InvalidInput, match="exists already"):
        fill("out", folder="out")
    assert everything() == ["out"]


def test_an_error_names_the_file_in_the_output() -> None:
    with (
        pytest.raises(OSError, match="No space") as caught,
        new("./out") as place,
    ):
        raise OSError(28, "No space left on device", str(place.output / "model.safetensors"))
    assert caught.value.filename == "./out/model.safetensors"


def test_a_workplace_that_cannot_be_prepared_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("r2m.output.new_file", full)
    with pytest.raises(OSError, match="No space"), new("a/out"):
        pass
    assert everything() == []


def test_what_a_killed_run_left_of_its_factors_is_its_own() -> None:
    Path("out.partial").mkdir()
    Path("out.partial/.r2m-factors-abc").write_text("factors")
    with new("out"):
        assert sorted(os.listdir("out.partial")) == ["lock", "output", "state.json"]
    assert everything() == ["out"]


def test_what_a_killed_command_left_in_an_output_goes_with_it() -> None:
    out = former_output("out")
    for place in (out, Path("out.partial")):
        (place / ".r2m-0123456789abcdef.partial").mkdir(parents=True)
        (place / ".r2m-0123456789abcdef.partial/file").write_text("half a card")
    with new("out", overwrite=True) as place:
        (place.output / "config.json").write_text("new")
    assert everything() == ["out", "out/config.json"]


REPLACED = "--overwrite replaces the output of a former merge"


def refusal(out: str, *, overwrite: bool, inputs: tuple[str, ...] = ()) -> str:
    before = everything()
    with pytest.raises(InvalidInput) as caught:
        check_output(out, overwrite=overwrite, inputs=inputs)
    assert everything() == before
    return str(caught.value)


def test_without_overwrite_nothing_that_exists_is_replaced() -> None:
    Path("empty").mkdir()
    former_output("former")
    Path("link").symlink_to("nowhere")
    Path("file").touch()
    for name in ("empty", "former", "link", "file", "./former"):
        assert refusal(name, overwrite=False) == f"out ({name}): exists already; {REPLACED}"
    check_output("new/er", overwrite=False, inputs=[])


def test_with_overwrite_only_an_empty_directory_or_a_former_output_is_replaced() -> None:
    Path("empty").mkdir()
    former_output("former")
    for allowed in ("new", "empty", "former"):
        check_output(allowed, overwrite=True, inputs=[])
    Path("link").symlink_to("former")
    Path("file").touch()
    for name in ("link", "file"):
        assert refusal(name, overwrite=True) == (
            f"out ({name}): is not a directory, and --overwrite replaces directories only"
        )
    Path("stranger").mkdir()
    Path("stranger/thesis.tex").touch()
    assert refusal("stranger", overwrite=True) == (
        "out (stranger): is not the output of a merge, so --overwrite does not replace it"
    )
    # A recipe alone does not make a project folder ours to delete.
    Path("stranger/r2m_config.yaml").touch()
    assert refusal("stranger", overwrite=True) == (
        "out (stranger): holds 'thesis.tex', which no merge wrote, so --overwrite does not replace it"
    )


def test_an_input_is_never_in_the_output() -> None:
    out = former_output("former")
    Path("link").symlink_to("former/model-00001-of-00002.safetensors")
    Path("linked").symlink_to("former")
    for path in (
        "former",
        str(out.resolve()),
        "former/model-00001-of-00002.safetensors",
        "link",
        "linked",
        "x/../former",
    ):
        sentence = f"out (former): is or holds the input {path}, and inputs are never written to"
        assert refusal("former", overwrite=True, inputs=("other", path)) == sentence
        assert refusal("former", overwrite=False, inputs=("other", path)) == sentence
    assert "is or holds the input" in refusal("linked", overwrite=True, inputs=("link",))
    check_output("former/new", overwrite=False, inputs=["former"])
    check_output("form", overwrite=False, inputs=["former"])


def test_every_spelling_of_a_directory_is_the_directory(here: Path) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("years of work")
    Path("far/away").mkdir(parents=True)
    Path("far/mine").mkdir()
    Path("far/mine/thesis.tex").write_text("someone else's")
    Path("link").symlink_to("far/away")
    assert refusal("", overwrite=True) == "out: expected a directory to create, got an empty path"
    for root in ("/", "/.", "//", "/tmp/.."):
        assert refusal(root, overwrite=True) == f"out ({root}): expected a directory to create, got the root of all"
    for out in ("missing/../mine", "link/../mine", "mine/", "mine/.", "mine/sub/..", "far/../mine"):
        for overwrite in (False, True):
            with pytest.raises(InvalidInput), new(out, overwrite=overwrite):
                pass
    assert Path("mine/thesis.tex").read_text() == "years of work"
    assert Path("far/mine/thesis.tex").read_text() == "someone else's"


def test_a_directory_inside_is_no_former_output(here: Path) -> None:
    former_output("former")
    Path("former/config.json").unlink(missing_ok=True)
    Path("former/config.json").mkdir()
    assert "holds 'config.json', which no merge wrote" in refusal("former", overwrite=True)


def test_a_link_with_a_slash_is_a_link(here: Path) -> None:
    former_output("former")
    Path("linked").symlink_to("former")
    assert "is not a directory" in refusal("linked/", overwrite=True)


def test_places_that_cannot_hold_a_directory(here: Path) -> None:
    Path("file").touch()
    assert refusal("file/out", overwrite=False) == f"out (file/out): {here / 'file'} is not a directory"


def test_a_place_without_permission(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != here)  # root may write anywhere
    with pytest.raises(PermissionError) as caught:
        check_output("new/out", overwrite=False, inputs=[])
    assert caught.value.filename == str(here)
    assert everything() == []
