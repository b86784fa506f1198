"""Heads that count the classes in different ways are brought into one order, or the merge is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from r2m.checkpoints.reader import open_checkpoint
from r2m.labels import Classes, into_config
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from conftest import Result

Command = Callable[..., "Result"]
State = dict[str, Tensor]
WIDTH = 12


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def detector(seed: int, outputs: int = 2) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"block.weight": (WIDTH, WIDTH), "classifier.weight": (outputs, WIDTH), "classifier.bias": (outputs,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def put(name: str, state: State, labels: Sequence[str] | None = None, **config: Any) -> str:
    Path(name).mkdir()
    save_file(state, f"{name}/model.safetensors")
    if labels is not None:
        config |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    Path(name, "config.json").write_text(json.dumps({"model_type": "vit", **config}))
    return name


def put_with(name: str, state: State, config: dict[str, Any]) -> str:
    """The same with exactly this configuration."""
    put(name, state)
    Path(name, "config.json").write_text(json.dumps(config))
    return name


def in_order(state: State, order: Sequence[int]) -> State:
    return {name: tensor[list(order)] if "classifier" in name else tensor for name, tensor in state.items()}


def expected(command: Command, *experts: State, base: State | None = None) -> State:
    """What comes of checkpoints that say nothing, so that nothing is turned."""
    words = ["--base", put("plain_base", base or detector(0, len(experts[0]["classifier.bias"])))]
    for i, state in enumerate(experts):
        words += ["--expert", f"e{i}={put(f'plain{i}', state)}"]
    assert command("merge", *words, "--out", "plain").code == 0
    return load_file("plain/model.safetensors")


def labels_of(out: str) -> list[str]:
    config = json.loads(Path(out, "config.json").read_text())
    assert config["label2id"] == {label: int(i) for i, label in config["id2label"].items()}
    return list(config["id2label"].values())


@pytest.mark.parametrize(
    ("labels", "others", "order"),
    [
        (("real", "fake"), ("Fake", "Real"), [1, 0]),
        (("bona fide", "spoof"), ("AI-generated", "human"), [1, 0]),
        (("real", "fake"), ("Real", "FAKE"), [0, 1]),
        (("real", "swap", "reenactment"), ("Swap", "Reenactment", "Real"), [2, 0, 1]),
    ],
)
def test_rows_are_put_in_the_order_of_the_first(
    labels: Sequence[str], others: Sequence[str], order: list[int], command: Command
) -> None:
    count = len(labels)
    base, first, second = (detector(seed, count) for seed in (0, 1, 2))
    put("base", base), put("a", first, labels), put("b", second, others)
    result = command("merge", "--base", "base", "--expert", "a=a", "--expert", "b=b", "--out", "out")
    assert result.code == 0
    merged = load_file("out/model.safetensors")
    turned = expected(command, first, in_order(second, order))
    assert all(torch.equal(merged[name], tensor) for name, tensor in turned.items())
    assert labels_of("out") == list(labels)
    report = json.loads(Path("out/r2m_report.json").read_text())
    assert report["arrangement"]["labels"] == list(labels)
    assert any("expert 'b'" in note and others[0] in note for note in report["notes"]) == (order != sorted(order))
    assert ("its head's rows were put so" in result.err) == (order != sorted(order))


def test_the_bases_order_counts_before_that_of_the_experts(command: Command) -> None:
    put("base", detector(0), ("fake", "real")), put("a", detector(1), ("real", "fake"))
    assert command("merge", "--base", "base", "--expert", "a=a", "--out", "out").code == 0
    merged = load_file("out/model.safetensors")
    turned = expected(command, in_order(detector(1), [1, 0]))
    assert all(torch.equal(merged[name], tensor) for name, tensor in turned.items())
    assert labels_of("out") == ["fake", "real"]


def test_other_classes_are_refused(command: Command) -> None:
    put("base", detector(0)), put("a", detector(1), ("real", "fake")), put("b", detector(2), ("cat", "dog"))
    result = command("merge", "--base", "base", "--expert", "a=a", "--expert", "b=b", "--out", "out")
    assert result.code == 2
    assert (
        "expert 'b' (b): its head tells 0 cat, 1 dog apart, expected the same classes as expert 'a' (a)" in result.err
    )
    assert not Path("out").exists()


def test_a_base_of_other_classes_says_nothing_of_the_experts(command: Command) -> None:
    put("base", detector(0), ("cat", "dog"), num_labels=2)
    put("a", detector(1), ("real", "fake"))
    assert command("merge", "--base", "base", "--expert", "a=a", "--out", "out").code == 0
    assert labels_of("out") == ["real", "fake"]


def test_a_base_with_more_labels_than_outputs_has_none_of_them_in_the_merge(command: Command) -> None:
    put("base", detector(0), [f"thing {i}" for i in range(1000)], num_labels=1000)
    put("a", detector(1))
    assert command("merge", "--base", "base", "--expert", "a=a", "--out", "out").code == 0
    assert labels_of("out") == ["LABEL_0", "LABEL_1"]
    assert json.loads(Path("out/config.json").read_text())["num_labels"] == 2


@pytest.mark.parametrize("options", [(), ("--method", "weight_average", "--head", "mean")])
def test_a_base_with_another_head_takes_that_of_the_experts(options: Sequence[str], command: Command) -> None:
    put("base", detector(0, 1000), [f"thing {i}" for i in range(1000)])
    put("a", detector(1), ("real", "fake")), put("b", detector(2), ("real", "fake"))
    words = ("--base", "base", "--expert", "a=a", "--expert", "b=b")
    assert command("merge", *words, *options, "--out", "out").code == 0
    merged = load_file("out/model.safetensors")["classifier.bias"]
    assert torch.equal(merged, (detector(1)["classifier.bias"] + detector(2)["classifier.bias"]) / 2)
    assert labels_of("out") == ["real", "fake"]
    assert command("init", "base", "a", "b", "--to", "recipe.yaml").code == 0
    assert command("inspect", "base", "a", "b").code == 0


def test_a_configuration_that_is_right_stays_as_it_is(command: Command) -> None:
    put("base", detector(0), ("real", "fake")), put("a", detector(1), ("real", "fake"))
    assert command("merge", "--base", "base", "--expert", "a=a", "--out", "out").code == 0
    assert Path("out/config.json").read_bytes() == Path("base/config.json").read_bytes()


def test_what_is_said_counts_more_than_files(command: Command) -> None:
    put("base", detector(0)), put("a", detector(1), ("real", "fake"))
    put("b", detector(2), ("real", "fake")), put("c", detector(3))
    recipe = {
        "base_model": "base",
        "models": [{"model": "a", "name": "a"}, {"model": "b", "name": "b", "fake": 0}, {"model": "c", "fake": 1}],
        "fake": 0,
    }
    Path("recipe.yaml").write_text(json.dumps(recipe))
    assert command("merge", "recipe.yaml", "--out", "out").code == 0
    merged = load_file("out/model.safetensors")
    turned = expected(command, in_order(detector(1), [1, 0]), detector(2), in_order(detector(3), [1, 0]))
    assert all(torch.equal(merged[name], tensor) for name, tensor in turned.items())
    assert command("merge", "out/r2m_config.yaml", "--out", "again").code == 0
    assert Path("again/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()
    result = command("merge", "recipe.yaml", "--out", "other", "--set", "fake=2")
    assert result.code == 2
    assert "fake: expected 0 or 1, for a head of two outputs, got 2" in result.err


@pytest.mark.parametrize(
    "config",
    [
        {"label2id": {"fake": 0, "real": 1}},
        {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"fake": 0, "real": 1}},
        {"architecture": "vit_base", "label_names": ["fake", "real"]},
        {"architecture": "vit_base", "pretrained_cfg": {"label_names": ["Fake", "Real"]}},
        {"id2label": ["fake", "real"]},
        {"class_names": ["fake", "real"]},
        {"classes": {"0": "fake", "1": "real"}},
        {"class_to_idx": {"fake": 0, "real": 1}},
        {"labels": ["fake", "real"]},
        {"idx_to_class": {"0": "fake", "1": "real"}},
        {"label2idx": {"fake": 0, "real": 1}},
        {"id2label": {"fake": 0, "real": 1}},
        {"classifier": {"classNames": ["fake", "real"]}},
    ],
)
def test_labels_are_read_wherever_libraries_keep_them(config: dict[str, Any], command: Command) -> None:
    put("base", detector(0)), put("a", detector(1), ("real", "fake")), put_with("b", detector(2), config)
    result = command("merge", "--base", "base", "--expert", "a=a", "--expert", "b=b", "--out", "out")
    assert result.code == 0
    assert "expert 'b' (b): its labels are 0 " in result.err
    assert "its head's rows were put so" in result.err


@pytest.mark.parametrize(
    "beside",
    [
        {"class_to_idx": {"fake": 0, "real": 1}},
        {"classes": ("fake", "real")},
        {"idx_to_class": {0: "fake", 1: "real"}},
        {"dataset_meta": {"CLASSES": ["fake", "real"]}},
    ],
    ids=str,
)
def test_labels_are_read_from_what_a_training_script_saved_beside_the_weights(
    beside: dict[str, Any], command: Command
) -> None:
    put("base", detector(0)), put("a", detector(1), ("real", "fake"))
    torch.save({"state_dict": detector(2), **beside}, "b.pth")
    save_file(detector(2), "c.safetensors", {name: json.dumps(one) for name, one in beside.items()})
    result = command("merge", "--base", "base", "--expert", "a=a", "--expert", "b=b.pth", "--out", "out")
    assert result.code == 0
    assert "expert 'b' (b.pth): its labels are 0 fake, 1 real, of expert 'a' (a) 0 real, 1 fake; its" in result.err
    assert "labels  0 fake, 1 real" in command("inspect", "b.pth").out
    result = command("merge", "--base", "base", "--expert", "a=a", "--expert", "c=c.safetensors", "--out", "other")
    assert result.code == 0
    assert ("its labels are 0 fake, 1 real" in result.err) == ("dataset_meta" not in beside)  # not nested there


def test_a_file_that_says_another_order_than_its_configuration_is_refused(command: Command) -> None:
    put("base", detector(0)), put("a", {}, ("real", "fake"))
    Path("a/model.safetensors").unlink()
    torch.save({"model": detector(1), "class_to_idx": {"fake": 0, "real": 1}}, "a/pytorch_model.bin")
    result = command("merge", "--base", "base", "--expert", "a=a", "--out", "out")
    assert result.code == 2
    assert (
        "expert 'a' (a): config.json beside it has its labels as real, fake, and it itself as fake, real" in result.err
    )


def test_labels_that_a_configuration_had_elsewhere_do_not_stay_beside_others(command: Command) -> None:
    put_with("base", detector(0), {"model_type": "vit", "labels": ["cat", "dog"], "head": {"classes": ["cat", "dog"]}})
    put("a", detector(1), ("real", "fake"))
    assert command("merge", "--base", "base", "--expert", "a=a", "--out", "out").code == 0
    assert labels_of("out") == ["real", "fake"]
    assert "cat" not in Path("out/config.json").read_text()


def test_numbers_are_labels(command: Command) -> None:
    put("base", detector(0)), put_with("a", detector(1), {"id2label": {"0": 0, "1": 1}, "class_names": ["0", "1"]})
    put_with("b", detector(2), {"id2label": {"0": 1, "1": 0}})
    result = command("merge", "--base", "base", "--expert", "a=a", "--expert", "b=b", "--out", "out")
    assert result.code == 0
    assert (
        "expert 'b' (b): its labels are 0 1, 1 0, of expert 'a' (a) 0 0, 1 1; its head's rows were put so" in result.err
    )


@pytest.mark.parametrize("key", ["id2label", "class_names", "label2id"])
def test_labels_that_cannot_be_read_are_told(key: str, command: Command) -> None:
    put("base", detector(0)), put_with("a", detector(1), {key: {"1": "real", "2": "fake"}})
    result = command("merge", "--base", "base", "--expert", "a=a", "--out", "out")
    assert result.code == 0
    assert f"expert 'a' (a): '{key}' of its config.json is not read; expected a label for every output" in result.err


def test_no_other_key_of_the_bases_labels_stays_beside_the_merges(command: Command) -> None:
    put_with("base", detector(0), {"model_type": "vit", "class_names": ["cat", "dog"]})
    put("a", detector(1), ("real", "fake"))
    assert command("merge", "--base", "base", "--expert", "a=a", "--out", "out").code == 0
    assert labels_of("out") == ["real", "fake"]
    assert "class_names" not in json.loads(Path("out/config.json").read_text())


def test_labels_of_a_merge_without_a_configuration_are_those_of_its_report(command: Command) -> None:
    save_file(detector(0), "base.safetensors")
    put("a", detector(1), ("fake", "real")), put("b", detector(2), ("real", "fake"))
    assert command("merge", "--base", "base.safetensors", "--expert", "a=a", "--out", "first").code == 0
    result = command("merge", "--base", "base.safetensors", "--expert", "b=b", "--expert", "first", "--out", "out")
    assert result.code == 0
    assert "expert 'first' (first): its labels are 0 fake, 1 real, of expert 'b' (b) 0 real, 1 fake;" in result.err


def test_labels_of_another_number_of_outputs_say_nothing(command: Command) -> None:
    things = [f"thing {i}" for i in range(1000)]
    put("base", detector(0)), put("a", detector(1), things), put("b", detector(2), [*things[1:], "thing 0"])
    result = command("merge", "--base", "base", "--expert", "a=a", "--expert", "b=b", "--out", "out")
    assert result.code == 0
    assert "expert 'b' (b): its config.json has 1000 labels and its head 2 outputs: they say nothing" in result.err


def test_two_orders_in_one_configuration_are_refused(command: Command) -> None:
    both = {"id2label": {"0": "real", "1": "fake"}, "label2id": {"real": 1, "fake": 0}}
    put("base", detector(0)), put_with("a", detector(1), both)
    result = command("merge", "--base", "base", "--expert", "a=a", "--out", "out")
    assert result.err == "Error: a/config.json: has its labels as real, fake and as fake, real; expected one order\n"


def test_other_orders_of_a_head_that_is_not_found_are_refused_and_one_order_is_not(command: Command) -> None:
    def unnamed(seed: int) -> State:
        return {name.replace("classifier.weight", "out.w"): tensor for name, tensor in detector(seed).items()}

    put("base", unnamed(0)), put("a", unnamed(1), ("real", "fake"))
    put("b", unnamed(2), ("fake", "real")), put("c", unnamed(2), ("real", "fake"))
    words = ("merge", "--base", "base", "--expert", "a=a", "--expert")
    assert command(*words, "c=c", "--out", "out").code == 0
    result = command(*words, "b=b", "--out", "other")
    assert result.code == 2
    assert "which tensors are its head is not known; name them (head_tensors, --head-tensors)" in result.err


@pytest.mark.parametrize(
    ("config", "outputs", "expected"),
    [
        ({"model_type": "vit"}, 5, {"id2label": {str(i): f"LABEL_{i}" for i in range(5)}}),
        ({"model_type": "vit", "num_labels": 1000}, 2, {"num_labels": 2}),
        ({"num_classes": 1000, "pretrained_cfg": {"num_classes": 1000}}, 2, {"pretrained_cfg": {"num_classes": 2}}),
        ({"num_classes": 2, "label_names": ["a", "b"]}, 3, {"num_classes": 3}),
    ],
)
def test_the_configuration_tells_how_many_outputs_there_are(
    config: dict[str, Any], outputs: int, expected: dict[str, Any]
) -> None:
    said = json.loads(into_config(json.dumps(config).encode(), Classes(), outputs))
    assert {key: said[key] for key in expected} == expected
    assert "label_names" not in said


def test_the_configuration_tells_the_type_of_what_was_written(command: Command) -> None:
    put("base", detector(0), None, torch_dtype="float32", vision_config={"dtype": "float32"}), put("a", detector(1))
    assert command("merge", "--base", "base", "--expert", "a", "--dtype", "bfloat16", "--out", "out").code == 0
    config = json.loads(Path("out/config.json").read_text())
    assert (config["torch_dtype"], config["vision_config"]) == ("bfloat16", {"dtype": "bfloat16"})


def test_who_does_not_say_its_labels_is_told(command: Command) -> None:
    put("base", detector(0)), put("a", detector(1), ("real", "fake")), put("b", detector(2), ("LABEL_0", "LABEL_1"))
    result = command("merge", "--base", "base", "--expert", "a=a", "--expert", "b=b", "--out", "out")
    assert result.code == 0
    assert "expert 'b' (b): does not say its labels, taken to be as of expert 'a' (a): 0 real, 1 fake" in result.err


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("based", [False, True])
def test_a_head_that_runs_against_the_others_is_told(outputs: int, based: bool, command: Command) -> None:
    way, start = torch.randn(2, outputs, 100, generator=torch.Generator().manual_seed(0)).unbind()
    base = {"block.weight": torch.ones(3, 3)}
    save_file({**base, "head.weight": start} if based else base, "base.safetensors")
    for name, factor in (("a", 1), ("b", -1), ("c", 1)):
        moved = way if factor > 0 else way.flip(0) if outputs == 2 else -way
        save_file({**base, "head.weight": moved + start * based}, f"{name}.safetensors")
    words = [word for name in "abc" for word in ("--expert", f"{name}={name}.safetensors")]
    said = command("merge", "--base", "base.safetensors", *words, "--out", "out").err
    assert said.count("its head runs against that of") == 1
    hint = " (fake: in a recipe)" * (outputs == 2)
    text = (
        "expert 'b' (b.safetensors): its head runs against that of expert 'a' (a.safetensors) (cosine -1.00): does it "
    )
    assert f"{text}count real and fake the other way round?{hint}\n" in said
    # Ways that have nothing to do with each other are no reason, nor is what files say of both.
    put("x", {**base, "head.weight": way}, ("real", "fake")[:outputs])
    put("y", {**base, "head.weight": -way}, ("real", "fake")[:outputs])
    save_file({**base, "head.weight": torch.randn(outputs, 100)}, "other.safetensors")
    for experts in ("x y", "a.safetensors other.safetensors"):
        words = [word for path in experts.split() for word in ("--expert", path)]
        assert (
            "runs against"
            not in command("merge", "--base", "base.safetensors", *words, "--out", "out", "--overwrite").err
        )


def test_one_more_and_one_less_give_the_bytes_of_a_merge_from_scratch(command: Command) -> None:
    put("base", detector(0)), put("a", detector(1), ("real", "fake")), put("b", detector(2), ("fake", "real"))
    one = ("--base", "base", "--expert", "a=a")
    assert command("merge", *one, "--head", "merge", "--out", "out").code == 0
    assert command("add", "out", "--expert", "b=b").code == 0
    assert command("merge", *one, "--expert", "b=b", "--head", "merge", "--out", "scratch").code == 0
    assert Path("out/model.safetensors").read_bytes() == Path("scratch/model.safetensors").read_bytes()
    put("c", detector(3), ("real", "fake"))
    assert command("add", "out", "--expert", "c=c").code == 0
    # The same file in another order is another expert: nothing that was found of it before counts.
    Path("b/config.json").write_text(Path("a/config.json").read_text())
    assert command("remove", "out", "--expert", "c").code == 0
    assert command("merge", *one, "--expert", "b=b", "--head", "merge", "--out", "anew").code == 0
    assert Path("out/model.safetensors").read_bytes() == Path("anew/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("labels", "fake"),
    [
        (("real", "deepfake"), 1),
        (("FaceSwap_fake", "original"), 0),
        (("genuine", "AI generated"), 1),
        (("FakeFace", "RealFace"), 0),
        (("AiArtData", "RealArt"), 0),
        (("real", "not real"), 1),
        (("fake", "not fake"), 0),
        (("main", "other"), None),  # words, and not letters in them
        (("fake", "spoof"), None),
        (("LABEL_0", "LABEL_1"), None),
    ],
)
def test_the_fakes_output_is_told_by_words(labels: Sequence[str], fake: int | None) -> None:
    assert Classes.called(labels).fake == fake


@pytest.mark.filterwarnings("ignore::r2m.places.FileSystemWarning")
@pytest.mark.parametrize(
    "text", ["[", "[1]", "{}", '{"id2label": 3}', '{"id2label": {"1": "a"}}', '{"id2label": {"0": 0.5}}']
)
def test_a_configuration_without_labels_says_nothing(text: str) -> None:
    Path("config.json").write_text(text)
    torch.save(detector(0), "model.pth")
    assert Classes.beside(open_checkpoint("model.pth", "one")) == Classes()
