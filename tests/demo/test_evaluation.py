"""AUC by forgery and by group, and the table made of them."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from r2m.demo.evaluation import auc, auc_by_forgery, ensemble, group_auc, pooled, score
from r2m.demo.networks import new_detector
from r2m.demo.table import COLUMNS, make_row, print_table, table_csv, table_json
from rich.console import Console
from sklearn.metrics import roc_auc_score

from r2m_kernels.errors import BadOption


def test_auc_is_the_share_of_pairs_ranked_rightly():
    rng = np.random.default_rng(0)
    real, forged = rng.normal(size=40), rng.normal(0.5, 1, size=30)
    pairs = (forged[:, None] > real[None, :]).mean()
    assert auc(real, forged) == pytest.approx(pairs, abs=1e-12)
    assert auc(np.zeros(3), np.zeros(5)) == 0.5  # ties count half


def test_auc_below_one_half_is_not_turned():
    assert auc(np.array([1.0, 2.0]), np.array([-1.0, 0.0])) == 0.0


def test_auc_of_one_class_is_refused():
    with pytest.raises(BadOption, match="AUC needs real and forged scores, got 0 and 2"):
        auc(np.array([]), np.array([1.0, 2.0]))


def group(rng, *names, inverted=()):
    forged = {name: rng.normal(-1.0 if name in inverted else 1.0, 1, size=50) for name in names}
    return {"real": rng.normal(size=50), **forged}


def test_a_group_is_the_mean_of_its_forgeries_inverted_ones_included():
    scores = group(np.random.default_rng(0), "a", "b", inverted=("b",))
    by_forgery = auc_by_forgery(scores)
    assert set(by_forgery) == {"a", "b"}
    assert by_forgery["b"] < 0.4
    assert group_auc(scores) == pytest.approx((by_forgery["a"] + by_forgery["b"]) / 2)
    assert roc_auc_score(*pooled(scores)) == pytest.approx(group_auc(scores))  # what the ROC picture relies on


def test_the_ensemble_averages_scores_picture_by_picture():
    members = [
        {"real": np.array([0.0, 2.0]), "a": np.array([1.0, 5.0])},
        {"real": np.zeros(2), "a": -np.ones(2)},
    ]
    both = ensemble(members)
    assert np.array_equal(both["real"], [0.0, 1.0])
    assert np.array_equal(both["a"], [0.0, 2.0])


def test_scores_rank_as_probabilities_do_and_batches_do_not_matter():
    import torch

    pictures = np.random.default_rng(0).uniform(size=(10, 48, 48)).astype(np.float32)
    detector = new_detector(0)
    scores = score(detector, pictures, batch=4)
    with torch.inference_mode():
        probability = detector(torch.from_numpy(pictures)).softmax(dim=1)[:, 1].double().numpy()
    assert 1 / (1 + np.exp(-scores)) == pytest.approx(probability, abs=1e-6)


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return [
        make_row(
            method,
            {
                "in-distribution": group(rng, "FS", "FR", "EFS"),
                "cross": group(rng, "FS", "FR", "EFS", inverted=("FS",)),
                "unseen": group(rng, "morph", "phase noise"),
            },
        )
        for method in ("base", "R2M")
    ]


def test_a_row_has_every_column(rows):
    for row in rows:
        assert tuple(row.auc) == COLUMNS
        mean = np.mean([row.auc[kind] for kind in ("FS", "FR", "EFS")])
        assert row.auc["in-distribution"] == pytest.approx(mean, abs=0.001)
        assert row.auc["cross"] < row.auc["in-distribution"]


def test_console_json_and_csv_agree(rows):
    console = Console(file=io.StringIO(), width=100)
    print_table(rows, ["[a note]"], console)
    printed = console.file.getvalue()
    content = json.loads(table_json(rows, ["[a note]"], seed=3))
    lines = list(csv.DictReader(io.StringIO(table_csv(rows).decode())))
    assert "[a note]" in printed
    assert content["notes"] == ["[a note]"]
    assert content["seed"] == 3
    for row, entry, line in zip(rows, content["rows"], lines, strict=True):
        assert row.method == entry["method"] == line["method"]
        cells = [f"{row.auc[column]:.3f}" for column in COLUMNS]
        assert [line[column] for column in COLUMNS] == cells
        assert [f"{entry[column]:.3f}" for column in COLUMNS] == cells
        assert next(text.split() for text in printed.splitlines() if row.method in text)[1:] == cells


def test_the_table_fits_in_eighty_columns(rows):
    console = Console(file=io.StringIO(), width=80)
    print_table(rows, [], console)
    assert "…" not in console.file.getvalue()
