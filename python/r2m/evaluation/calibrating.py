"""Temperature and bias of log-odds, from few labels or from none. Where nothing else is said: docs/calibration.md."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from r2m.log_odds import Calibration
from r2m_kernels.errors import BadFile

Numbers = NDArray[np.float64]
FEWEST = 8  # pictures without labels; with labels, of either class a quarter of it
_STEPS, _HALVINGS = 100, 60


@dataclass(frozen=True)
class Labelled:
    """Log-odds of fake with labels.

    Attributes:
        logits: (n,).
        labels: (n,) 1 fake, 0 real.
    """

    logits: Numbers
    labels: NDArray[np.int64]


# How far apart the log-odds of reals and of fakes are taken to lie where no label says it, in standard deviations of
# either: d', here of an AUC of about .76.
SEPARATION = 1.0
# How sure that is: the standard deviation of the logarithm of 1/T around what it gives.
_SURE = 1.0


def without_labels(logits: Numbers, fakes: float) -> Calibration:
    """From log-odds of pictures of which a share ``fakes`` is taken to be fakes.

    T: as if reals and fakes were two normal distributions of one width, :data:`SEPARATION` apart, mixed in that share,
    whose spread is that of the log-odds. b: then the mean probability is the share.

    Raises:
        BadFile: fewer than :data:`FEWEST` pictures, or all have the same log-odds.
    """
    if len(logits) < FEWEST:
        raise BadFile(f"calibrate: expected {FEWEST} pictures at least, better 32, got {len(logits)}")
    temperature = 1 / _slope(logits, fakes)
    return Calibration(temperature, _bias(logits / temperature, fakes))


def with_labels(one: Labelled, fakes: float) -> Calibration:
    """From labels: the most probable logistic regression, classes weighed to a share ``fakes``.

    The logarithm of 1/T has a normal prior around what :func:`without_labels` takes, so that few pictures that are told
    apart without an error do not make T zero.

    Raises:
        BadFile: too few of a class, or all have the same log-odds.
    """
    counts = np.bincount(one.labels, minlength=2)
    if counts.min() < FEWEST // 4:
        raise BadFile(
            f"calibrate: expected {FEWEST // 4} reals and {FEWEST // 4} fakes at least, better 8 of each, got "
            f"{counts[0]} and {counts[1]}"
        )
    weights = len(one.labels) * np.where(one.labels == 1, fakes / counts[1], (1 - fakes) / counts[0])
    usual = math.log(_slope(one.logits, fakes))
    middle = float(one.logits.mean())
    # Newton's method in the slope's logarithm and the bias at the middle; halved until the loss falls.
    at = np.array([usual, math.log(fakes / (1 - fakes))])

    def loss(place: Numbers) -> float:
        z = math.exp(min(place[0], 50.0)) * (one.logits - middle) + place[1]
        prior = (float(place[0]) - usual) ** 2 / (2 * _SURE**2)
        return float(weights @ (np.logaddexp(0, z) - one.labels * z)) + prior

    for _ in range(_STEPS):
        scaled = math.exp(at[0]) * (one.logits - middle)
        fake = probability(scaled + at[1])
        error, curved = weights * (fake - one.labels), weights * fake * (1 - fake)
        gradient = np.array([error @ scaled + (at[0] - usual) / _SURE**2, error.sum()])
        # Without the part that may be negative: a direction down, always.
        across = curved @ scaled
        hessian = np.array([[curved @ scaled**2 + 1 / _SURE**2, across], [across, curved.sum() + 1e-9]])
        step, size = np.linalg.solve(hessian, gradient), 1.0
        while loss(at - size * step) > loss(at) and size > 2.0**-_HALVINGS:
            size /= 2
        at = at - size * step
        if float(np.abs(size * step).max()) < 1e-10:
            break
    slope = math.exp(at[0])
    return Calibration(1 / slope, float(at[1]) - slope * middle)


def _slope(logits: Numbers, fakes: float) -> float:
    """1/T: of log-odds of two normal distributions, by their spread together."""
    spread = float(logits.std())
    if not spread > 0:
        raise BadFile(f"calibrate: expected pictures that differ, got the same log-odds for all {len(logits)}")
    return SEPARATION * math.sqrt(1 + fakes * (1 - fakes) * SEPARATION**2) / spread


def _bias(scaled: Numbers, fakes: float) -> float:
    """The b with which the mean probability is ``fakes``: it rises with b, so that halving finds it."""
    low, high = -float(scaled.max()) - 50.0, -float(scaled.min()) + 50.0
    for _ in range(2 * _HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(scaled + middle).mean() < fakes else (low, middle)
    return (low + high) / 2


def probability(logits: Numbers) -> Numbers:
    """Of fake, from its log-odds of any size."""
    half: Numbers = 0.5 * (1 + np.tanh(logits / 2))
    return half
