"""Ideas of ours about single weights, their metric and their coefficients (see ``ideas``)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import gaussian_filter
from scipy.special import ndtri
from torch import Tensor

from bench.quality.ideas import core_of
from bench.quality.methods import Candidate, merged
from bench.quality.mobilenet import mobilenet
from bench.quality.parts import Parts, StateDict, in_type_of
from r2m_kernels.heads import head_names

State = Mapping[str, Tensor]
TINY = 1e-30


def _by_elements(parts: Parts, of_residuals: Callable[[Tensor], Tensor], eta: float) -> StateDict:
    """The restored core, and of whole residuals with their norms matched what ``of_residuals`` makes of N tensors."""
    core, gain = core_of(parts), parts.gain**0.5
    rests = {name: tau - core[name] for name, tau in parts.tau.items()}
    norms = torch.stack([rest.square().sum((1, 2)) for rest in rests.values()]).sum(0).sqrt()
    scales = (norms.mean() / norms)[:, None, None]
    changes = {name: gain * core[name] + eta * of_residuals(scales * rest) for name, rest in rests.items()}
    return parts.merged(changes, gain)


def element_power(base: State, experts: Sequence[State], *, power: float = 1.0, eta: float = 1.0) -> StateDict:
    """What the default does by rows, weight by weight: each expert's counts by its size to the power of it.

    AdamW moves a weight by about its rate a step: far where gradients agree, by a random walk where they do not; so how
    far a weight came says how sure it is.
    """

    def weighed(rests: Tensor) -> Tensor:
        sizes = rests.abs() ** power
        return (sizes * rests).sum(0) / sizes.sum(0).clamp_min(TINY)

    return _by_elements(Parts.of(base, experts), weighed, eta)


def elected(base: State, experts: Sequence[State], *, density: float = 0.2, eta: float = 1.0) -> StateDict:
    """Residuals cut as TIES cuts task vectors and not in rank: the largest weights, of the sign that has more of it."""

    def chosen(rests: Tensor) -> Tensor:
        kept = _largest(rests, density)
        agree = (kept * kept.sum(0).sign()) > 0
        return (kept * agree).sum(0) / agree.sum(0).clamp_min(1)

    return _by_elements(Parts.of(base, experts), chosen, eta)


def trimmed(base: State, experts: Sequence[State], *, density: float, then: Candidate) -> StateDict | list[StateDict]:
    """Another rule, of specialists whose matrices keep the changes that are largest in each tensor."""
    parts = Parts.of(base, experts)
    kept = {name: _largest(tau, density) for name, tau in parts.tau.items()}
    made = []
    for index, expert in enumerate(experts):
        changed = {
            n: (base[n].double() + one[index].reshape(base[n].shape)).to(base[n].dtype) for n, one in kept.items()
        }
        made.append({**expert, **changed})
    return merged(then, dict(base), made)


def _largest(tau: Tensor, density: float) -> Tensor:
    """(N, m, n) → the same, of each (m, n) the share with the largest absolute values and 0 else."""
    sizes = tau.abs().flatten(1)
    count = max(1, round(density * sizes.shape[1]))
    least = sizes.kthvalue(sizes.shape[1] - count + 1, dim=1).values
    return tau * (tau.abs() >= least[:, None, None])


def head_restored(
    base: State, experts: Sequence[State], *, then: Candidate, scale: float | None = None
) -> list[StateDict]:
    """Another rule, and the classifier's mean change as long as the specialists' are (or ``scale`` times as long).

    All classifiers start from one random one, which the mean keeps whole while what they learned cancels in part.
    """
    (state,) = merged(then, dict(base), experts)
    for name in head_names({n: tensor.shape for n, tensor in base.items() if tensor.is_floating_point()}):
        changes = torch.stack([expert[name].double() - base[name].double() for expert in experts])
        mean = changes.mean(0)
        longer = float(changes.flatten(1).norm(dim=1).mean() / mean.norm()) if scale is None else scale
        state[name] = (base[name].double() + longer * mean).to(base[name].dtype)
    return [state]


def in_metric(base: State, experts: Sequence[State], *, then: Candidate) -> list[StateDict]:
    """Another rule, of weights times how large their input is and how much their output counts.

    Normalisation layers say both without data: a channel behind one is about N(β, γ²) before ReLU6, and one in front
    of one is divided by its σ and multiplied by its γ. For MobileNetV2 alone.
    """
    scales = _metric(base)

    def times(state: State, power: int) -> StateDict:
        made = {n: (state[n].double() * scale**power).to(state[n].dtype) for n, scale in scales.items()}
        return {**state, **made}

    states = merged(then, times(base, 1), [times(expert, 1) for expert in experts])
    return [times(state, -1) for state in states]


def _metric(base: State) -> dict[str, Tensor]:
    """Filter → float64 that broadcasts to its shape: √E[x²] of each input channel times γ/σ of each output's."""
    quantiles = torch.from_numpy(ndtri((np.arange(64) + 0.5) / 64))
    moments, scales = torch.ones(3, dtype=torch.float64), {}
    stream = moments
    with torch.device("meta"):
        in_order = list(mobilenet().state_dict())  # a file's are by name
    for name, following in itertools.pairwise(in_order):
        shape = base[name].shape
        if len(shape) != 4 or base[following].shape != shape[:1]:
            continue
        norm = following.removesuffix("weight")
        gamma, beta = base[following].double(), base[f"{norm}bias"].double()
        out = gamma.abs() / (base[f"{norm}running_var"].double() + 1e-5).sqrt()
        depthwise = shape[1] == 1
        inputs = moments.sqrt().clamp_min(1e-3 * float(moments.max().sqrt()))
        scales[name] = (out * inputs if depthwise else out).clamp_min(1e-3 * float(out.max())).view(-1, 1, 1, 1)
        if not depthwise:
            scales[name] = scales[name] * inputs.view(1, -1, 1, 1)
        if not depthwise and shape[0] < shape[1]:  # narrowed: no ReLU6, and added to a block's input where it fits
            made = gamma.square() + beta.square()
            moments = stream = stream + made if stream.shape == made.shape else made
        else:
            moments = (beta + gamma.abs() * quantiles[:, None]).clamp(0, 6).square().mean(0)
    return scales


def distilled(
    base: State, experts: Sequence[State], *, steps: int = 40, rate: float = 0.02, batch: int = 32
) -> StateDict:
    """Σ c_li τ_li with coefficients learned on made-up pictures: one model is to answer them as the ensemble does.

    No data: pictures are dead leaves, blurred and noisy to different degrees. A coefficient a tensor and specialist,
    1/N to begin with, by Adam on the squared distance of logit differences over the ensemble's variance.
    """
    network = mobilenet().eval().requires_grad_(False)
    pictures = torch.from_numpy(dead_leaves(4 * batch, 80, np.random.default_rng(0)))

    def logit(state: State, some: Tensor) -> Tensor:
        two: Tensor = torch.func.functional_call(network, dict(state), (some,))
        return two[:, 1] - two[:, 0]

    with torch.no_grad():
        wanted = torch.stack([logit(expert, pictures) for expert in experts]).mean(0)
    moved = [name for name, tensor in base.items() if any(not torch.equal(tensor, expert[name]) for expert in experts)]
    tau = {name: torch.stack([expert[name] - base[name] for expert in experts]) for name in moved}
    coefficients = torch.full((len(moved), len(experts)), 1 / len(experts), requires_grad=True)
    optimizer = torch.optim.Adam([coefficients], rate)

    def state() -> StateDict:
        made = {n: base[n] + torch.tensordot(c, tau[n], 1) for n, c in zip(moved, coefficients, strict=True)}
        return {**base, **made}

    for step in range(steps):
        some = slice(step * batch % len(pictures), step * batch % len(pictures) + batch)
        loss = (logit(state(), pictures[some]) - wanted[some]).square().mean() / wanted.var()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        return in_type_of(base, state())


def dead_leaves(count: int, size: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """(count, size, size) float32 in [0, 1]: discs over one another, radii by a power law, then blur and noise."""
    y, x = np.mgrid[:size, :size]
    made = np.empty((count, size, size), np.float32)
    for picture in made:
        picture[:] = rng.random()
        for _ in range(80):
            radius = 2 * (1 - rng.random()) ** -0.7
            disc = (y - rng.random() * size) ** 2 + (x - rng.random() * size) ** 2 < min(radius, size / 2) ** 2
            picture[disc] = rng.random()
        picture[:] = gaussian_filter(picture, rng.uniform(0.3, 2)) + rng.normal(0, rng.uniform(0, 0.04), picture.shape)
    return made.clip(0, 1)
