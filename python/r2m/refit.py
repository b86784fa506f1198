"""A classifier fitted again on features of the merged model, for ``head: refit``."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r2m.checkpoints.reader import open_checkpoint
from r2m.extras import need
from r2m_kernels.errors import BadFile, DoesNotFit, NotFinite, printable, quoted

# Linear discriminant analysis with a shrunk covariance, in closed form; or logistic regression.
RULES = ("lda", "logistic")


@dataclass(frozen=True)
class Features:
    """What a classifier is fitted on.

    Attributes:
        values: (n, d) float64.
        labels: (n,) 1 fake, 0 real.
        digest: SHA-256 of the file they are from.
    """

    values: NDArray[np.float64]
    labels: NDArray[np.int64]
    digest: str


def read_features(path: str | Path) -> Features:
    """From a safetensors or torch file with ``features`` (n, d) and ``labels`` (n,).

    Raises:
        BadFile: they are not there, do not fit each other, or are of one class.
        NotFinite: NaN or Inf in them.
        OSError: it cannot be read.
    """
    what = f"head_features ({path})"
    source = open_checkpoint(path, what)
    if not {"features", "labels"} <= source.specs.keys():
        raise BadFile(f"{what}: expected tensors features (n, d) and labels (n,), got {', '.join(source.specs)}")
    values, labels = source.read("features"), source.read("labels")
    if values.ndim != 2 or labels.shape != values.shape[:1] or not len(labels):
        raise BadFile(
            f"{what}: expected features (n, d) and labels (n,), got {tuple(values.shape)} and {tuple(labels.shape)}"
        )
    if not bool(values.double().isfinite().all()):
        raise NotFinite(f"{what}: features hold NaN or Inf")
    if set(labels.tolist()) != {0, 1} or labels.is_floating_point():
        raise BadFile(f"{what}: expected labels 0 (real) and 1 (fake), both of them, as whole numbers")
    with open(source.files[0], "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Features(values.double().numpy(), labels.long().numpy(), digest)


def _fit(features: Features, rule: str) -> tuple[NDArray[np.float64], float]:
    """(d,) w and b, such that w·x + b is the log-odds of fake, by one of :data:`RULES`."""
    need("head: refit", "evaluate", "sklearn")
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import LogisticRegression

    mean, scale = features.values.mean(0), features.values.std(0)
    scale = np.where(scale > 0, scale, 1.0)  # a feature that never changes has no say
    model = {
        "lda": LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
        "logistic": LogisticRegression(max_iter=10_000),
    }[rule]
    model.fit((features.values - mean) / scale, features.labels)
    weight = model.coef_[0] / scale
    return weight, float(model.intercept_[0] - weight @ mean)


def head(shapes: dict[str, tuple[int, ...]], features: Features, rule: str) -> dict[str, Tensor]:
    """Tensors of a linear classifier of these shapes, float32, fitted.

    Args:
        shapes: name → shape: a matrix (2, d) or (1, d), and a vector beside it if there is one.
        features: of the merged model, d of them.
        rule: one of :data:`RULES`.

    Raises:
        BadOption: scikit-learn is missing.
        DoesNotFit: no such classifier, or of another d.
    """
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    vectors = [name for name, shape in shapes.items() if len(shape) == 1]
    outputs, width = shapes[matrices[0]] if len(matrices) == 1 else (0, 0)
    fits = outputs in (1, 2) and len(vectors) <= 1 and all(shapes[name] == (outputs,) for name in vectors)
    if not fits or len(matrices) + len(vectors) < len(shapes):
        listed = ", ".join(f"{printable(name)} {list(shape)}" for name, shape in shapes.items())
        raise DoesNotFit(f"head: refit expects one matrix (2, d) or (1, d), and its bias if there is one; got {listed}")
    if features.values.shape[1] != width:
        raise DoesNotFit(f"head: refit: expected {width} features, got {features.values.shape[1]}")
    weight, bias = _fit(features, rule)
    # Of two logits the second is fake: their difference is the log-odds.
    signs = np.array([[1.0]]) if outputs == 1 else np.array([[-0.5], [0.5]])
    fitted = {matrices[0]: torch.tensor(signs * weight, dtype=torch.float32)}
    for name in vectors:
        fitted[name] = torch.tensor(signs[:, 0] * bias, dtype=torch.float32)
    if not vectors and abs(bias) > 0:
        raise DoesNotFit(f"head: refit: {quoted(matrices[0])} has no bias beside it, and the fit needs one")
    return fitted
