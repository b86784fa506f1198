"""Tables of an evaluation: 80 columns in a terminal, and the same for papers and spreadsheets."""

from __future__ import annotations

import csv
from typing import Any

import pytest
from r2m.evaluation.metrics import KEYS
from r2m.evaluation.tables import FORMATS, Table, columns_asked, few_columns, lines, tables

from r2m_kernels.errors import BadOption


def judged(auc: float | None, videos: int = 10) -> dict[str, Any]:
    spread = None if auc is None else [auc - 0.02, auc + 0.02]
    return {
        **dict.fromkeys(KEYS, auc),
        **{"frames": 40, "videos": videos, "intervals": {"auc": spread, "video_auc": spread}},
    }


def evaluation(values: dict[str, list[float | None]], **of_models: dict[str, Any]) -> dict[str, Any]:
    """Models with AUCs on datasets d0, d1 and so on."""
    models = {}
    for name, aucs in values.items():
        datasets = {f"d{place}": judged(auc) for place, auc in enumerate(aucs)}
        defined = {one: auc for one, auc in zip(datasets, aucs, strict=True) if auc is not None}
        least = min(defined, key=lambda one: defined[one])
        mean = sum(defined.values()) / len(defined)
        models[name] = {
            "datasets": datasets,
            "average": dict.fromkeys(KEYS, mean),
            "average_intervals": {key: [mean - 0.01, mean + 0.01] for key in ("auc", "video_auc")},
            "worst": {key: {"dataset": least, "value": defined[least]} for key in KEYS},
            **{"role": None, "specialists": [], "robustness": None},
            **of_models.get(name, {}),
        }
    return {"models": models, "differences": [], "settings": {"threshold_from": None}}


FEW = ["videos", "auc", "eer"]


def table(of: dict[str, Any], columns: list[str] | None = None) -> Table:
    return tables(of, columns or FEW)[0]


def test_a_table_in_words() -> None:
    of = evaluation({"merged": [0.9, None, 0.8004], "fs": [0.95, None, 0.8001]})
    assert FORMATS["text"](table(of)) == [
        "dataset  model   videos                   AUC    EER",
        "d0       merged      10  0.900 [0.880, 0.920]  0.900",
        "d0       fs          10  0.950 [0.930, 0.970]  0.950",
        "d1       merged      10                     –      –",
        "d1       fs          10                     –      –",
        "d2       merged      10  0.800 [0.780, 0.820]  0.800",
        "d2       fs          10  0.800 [0.780, 0.820]  0.800",
        "mean     merged          0.850 [0.840, 0.860]  0.850",
        "mean     fs              0.875 [0.865, 0.885]  0.875",
        "worst    merged                    0.800 (d2)  0.800",
        "worst    fs                        0.800 (d2)  0.800",
    ]


@pytest.mark.parametrize("columns", [FEW, list(KEYS), ["auc"], ["frames", "videos", "video_auc", *KEYS[:4]]])
def test_it_fits_80_columns(columns: list[str]) -> None:
    names = [f"/datasets/of/2026/runs/train_on_{name}/checkpoint-{3 * name}.safetensors" for name in range(8, 24)]
    of = evaluation({name: [0.9, 0.8] for name in names})
    for one in of["models"].values():
        one["datasets"] = {f"a dataset of {key} and more words": value for key, value in one["datasets"].items()}
    found = FORMATS["text"](table(of, columns))
    assert max(map(len, found)) <= 80
    blocks = "\n".join(found).split("\n\n")
    for block in blocks:
        shown = block.splitlines()[1:]
        assert len(shown) == 16 * 4
        assert len({tuple(line.split()[:2]) for line in shown}) == 16 * 4  # names still differ
    assert sum(block.splitlines()[0].count("AUC") for block in blocks) == sum("auc" in key for key in columns)


def test_a_dataset_that_gave_thresholds_is_not_one_to_average() -> None:
    of = evaluation({"m": [0.9, 0.8]})
    assert [row[0].value for row in table(of).rows] == ["d0", "d1", "mean", "worst"]
    of["settings"]["threshold_from"] = "d1"
    assert [row[0].value for row in table(of).rows] == ["d0", "d1"]


def test_names_give_way_before_columns_do() -> None:
    of = evaluation({"quick brown foxes and dogs": [0.9], "five lazy boxing wizards jump": [0.8]})
    columns = ["videos", "video_auc", "auc", "balanced_acc", "eer"]
    for one in of["models"].values():
        one["datasets"] = {"sphinx of black quartz judges": one["datasets"]["d0"]}
    found = FORMATS["text"](table(of, columns))
    assert len(found) == 3  # in one block
    assert 75 < max(map(len, found)) <= 80


def test_markdown_latex_and_csv_have_the_same() -> None:
    of = evaluation({"a|b_c": [0.9, 0.7], "100 %": [0.8, 0.7]})
    made = table(of)
    markdown = FORMATS["markdown"](made)
    assert markdown[:3] == [
        "| dataset | model | videos | AUC | EER |",
        "| --- | --- | ---: | ---: | ---: |",
        r"| d0 | a\|b_c | 10 | **0.900 \[0.880, 0.920\]** | 0.900 |",
    ]
    assert markdown[3] == r"| d0 | 100 % | 10 | 0.800 \[0.780, 0.820\] | **0.800** |"  # of errors less is better
    latex = FORMATS["latex"](made)
    assert latex[:4] == [
        r"\begin{tabular}{llrrr}",
        r"\toprule",
        r"dataset & model & videos & AUC & EER \\",
        r"\midrule",
    ]
    assert latex[4] == r"d0 & a|b\_c & 10 & \textbf{0.900 [0.880, 0.920]} & 0.900 \\"
    assert r"d0 & 100 \% & 10 & 0.800 [0.780, 0.820] & \textbf{0.800} \\" in latex
    assert latex.count(r"\midrule") == 4  # under the head, and between the datasets, mean and worst
    rows = list(csv.DictReader(FORMATS["csv"](made)))
    assert (rows[0]["model"], rows[0]["AUC"], rows[0]["AUC from"], rows[0]["AUC to"]) == (
        "a|b_c",
        "0.9",
        "0.88",
        "0.92",
    )
    assert len(rows) == 8
    assert {len(row) for row in rows} == {7}
    # Equal as they are printed: both are the best.
    assert sum("**0.700 " in line for line in markdown if line.startswith("| d1")) == 2


def difference(model: str, than: str, dataset: str, value: float) -> dict[str, Any]:
    row = {"model": model, "than": than, "dataset": dataset, "metric": "auc"}
    return {**row, "difference": value, "interval": [value - 0.01, value + 0.01]}


def test_differences_to_the_best_specialist_and_the_average() -> None:
    merge = {"role": "merge", "specialists": ["fs", "fr"]}
    values = {"m": [0.9, 0.9], "fs": [0.8, 0.6], "fr": [0.7, 0.9], "mean": [0.8, 0.8]}
    of = evaluation(values, m=merge, mean={"role": "average"}, fs={"role": "specialist"}, fr={"role": "specialist"})
    than = ("fs", "fr", "mean")
    of["differences"] = [difference("m", one, dataset, 0.1) for one in than for dataset in ("d0", "d1", "mean")]
    of["differences"] += [{**row, "metric": "video_auc"} for row in of["differences"]]
    assert FORMATS["text"](tables(of, FEW)[1]) == [
        "model  minus  which is         on                        AUC",
        "m      fr     best specialist  mean  +0.100 [+0.090, +0.110]",
        "m      mean   average          mean  +0.100 [+0.090, +0.110]",
    ]
    of = evaluation({"m": [0.9], "other": [0.8]})
    of["differences"] = [difference("other", "m", "d0", -0.1)]
    assert FORMATS["text"](tables(of, FEW)[1])[1:] == ["other  m      d0  -0.100 [-0.110, -0.090]"]
    assert "" in lines(tables(of, FEW), "text")


def test_columns_can_be_chosen() -> None:
    assert columns_asked(" auc, video_eer,frames") == ["auc", "video_eer", "frames"]
    assert columns_asked(None) is None
    for wrong in ("auroc", "video_frames", ""):
        with pytest.raises(BadOption, match=f"--columns {wrong}: expected some of frames, videos, acc, "):
            columns_asked(wrong)
    of = evaluation({"m": [0.9]})
    assert few_columns(of)[:2] == ["videos", "video_auc"]
    of["models"]["m"]["datasets"]["d0"]["frames"] = 10
    assert few_columns(of)[:2] == ["frames", "auc"]


def test_degradations_stand_beside_what_pictures_are() -> None:
    kept = {"jpeg-30": {"average": {"auc": 0.7}}, "noise-10": {"average": {"auc": None}}}
    of = evaluation({"a": [0.9], "finished scores": [0.8]}, a={"robustness": kept})
    (found,) = (one for one in tables(of, FEW) if one.name == "robustness")
    assert FORMATS["text"](found) == [
        "pictures, AUC      a",
        "as they are    0.900",
        "jpeg-30        0.700",
        "noise-10           –",
    ]
