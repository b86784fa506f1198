"""JSON files that commands write for each other and for scripts: what stands in each, and in which version.

A key more does not make another version; a key that goes or means something else does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r2m.places import MOST_RECORD, read_mapping, to_output
from r2m_kernels.errors import BadFile, R2MError, printable

WRITTEN = "written"
VERSION, SEAL = "schema_version", "digest"
_SHOWN = 100  # letters of what is wrong with a file
SEALED = "SHA-256 of all else in it, as JSON with sorted keys: whether anybody has changed it"


@dataclass(frozen=True)
class Record:
    """One of them.

    Attributes:
        file: its name.
        title: what it is.
        version: of what stands in it.
        keys: key → what it says. A dot leads to what is in an object; ``*`` stands for a name, or an entry of a list.
        sealed: whether it has a :data:`SEAL`.
    """

    file: str
    title: str
    version: int
    keys: Mapping[str, str]
    sealed: bool = False

    def text(self, content: Mapping[str, Any], indent: int | None = 2) -> bytes:
        """The file; what its content has of an earlier one's version and seal is left."""
        content = {VERSION: self.version} | {key: content[key] for key in content if key not in (VERSION, SEAL)}
        content |= {SEAL: _seal(content)} if self.sealed else {}
        text = json.dumps(content, allow_nan=False, indent=indent, ensure_ascii=False)
        return (text + "\n").encode(errors="backslashreplace")

    def read(self, directory: Path, what: str) -> dict[str, Any]:
        """Its content, from where it was written; files of 0.1 have no version.

        Args:
            directory: where it lies.
            what: how error messages name it.

        Raises:
            BadFile: it is not that, or was written by a package that is newer.
            OSError: it cannot be read; ``filename`` is set.
        """
        content = read_mapping(directory / self.file, what, MOST_RECORD)
        version = content.get(VERSION, 0)
        if not isinstance(version, int) or isinstance(version, bool) or not 0 <= version <= self.version:
            raise BadFile(
                f"{what}: expected {VERSION} {self.version} or less, got {json.dumps(version)[:40]}; a newer "
                "r2m_kernels wrote it"
            )
        return content

    def whole(self, directory: Path, what: str) -> dict[str, Any]:
        """The same of a sealed one. Arguments and other errors are :meth:`read`'s.

        Raises:
            BadFile: it was changed since.
        """
        content = self.read(directory, what)
        if content.get(SEAL) != _seal({key: content[key] for key in content if key != SEAL}):
            raise BadFile(f"{what}: was changed since a merge wrote it")
        return content


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


REPORT = Record(
    "r2m_report.json",
    "what a merge found and did",
    1,
    {
        "method": "by which name the configuration was made",
        "notes": "sentences on what was understood in another way than it stands there",
        "versions": "of r2m_kernels, torch, numpy and Python",
        "backend.name": "who computed: native, triton or torch",
        "backend.reason": "why that one",
        "backend.device": "where",
        "config": "every field of the configuration",
        "experts": "names, in the order of all lists and matrices here",
        "task_vectors.gram": "inner products of task vectors over matrix tensors",
        "task_vectors.norms": "their lengths, by expert",
        "task_vectors.relative_to_base": "the same as shares of the base's length",
        "task_vectors.cosines": "between each two",
        "task_vectors.vector_gram": "inner products over vector tensors",
        "core.coefficients": "of each task vector in the core, the Real component",
        "core.norm": "of the core",
        "core.mean_norm": "of the mean task vector",
        "core.norm_ratio_to_mean": "the first by the second",
        "core.norm_uncertain": "whether rounding may have changed it by a per cent",
        "core.dimension": "of the Real subspace",
        "core.weighted_gram": "the matrix whose eigenvectors span it",
        "core.eigenvalues": "of that matrix, the largest first",
        "core.gap": "between the last eigenvalue kept and the next, as a share",
        "core.scale_used": "λ: the core was multiplied by it",
        "core.left": "what of λ whole residuals leave of the core; null where residuals are truncated",
        "core.share_of_update": "of the update's energy, the core's; null where residual.norm is",
        "residual.norms": "of the truncated residuals, by expert",
        "residual.scales": "by which their norms were matched, by row in the weights alone",
        "residual.eta_used": "η: their weighted mean was multiplied by it",
        "residual.norm": "of the residual term, over matrices; null where rows are weighted and nothing was merged",
        "residual.cancelled": "whether the residuals cancel, so that a relative η was bounded",
        "residual.cut": "of each residual's energy, what truncation left out",
        "residual.norm_ratio_to_core": "the residual term's norm by the core's",
        "tensors.*.name": "of every output tensor",
        "tensors.*.role": "matrix, vector, statistic, copied (from the base) or extra (of the experts alone)",
        "tensors.*.shape": "its shape",
        "tensors.*.dtype": "its type",
        "tensors.*.rank": "of its residuals, of a matrix",
        "tensors.*.kept_energy": "of each residual, as a share",
        "tensors.*.uncertain": "experts for which that is a difference of nearly equal numbers",
        "tensors.*.distance_to_optimum": "an estimate of the truncation's error over the least possible, less 1",
        "tensors.*.distance_basis": "what the estimate rests on",
        "head": "tensors of the classifier that were averaged alone",
        "tied": "names of tensors that are stored once, and under which name",
        "dropped": "tensors of experts that went nowhere",
        "steps.*.step": "a pass over the inputs",
        "steps.*.seconds": "its time",
        "steps.*.bytes_read": "what it read",
        "warnings": "sentences on what looks wrong",
        "specialists": "how many specialists each expert stands for",
        "preprocessing": "of pictures: size, mean and standard deviation, where it is known",
        "arrangement.preset": "by which names were fitted to the base's",
        "arrangement.head": "how the classifier was merged, and which tensors it is",
        "arrangement.labels": "of its outputs, in order, where they are known",
        "arrangement.folded": "tensors that came as factors and were multiplied",
        "adapters": "kind, ranks by matrix, numbers in each, modules saved whole, tensors that are the mean in all; "
        "null: none",
        "calibration": "temperature and bias in the classifier, by which rule, on how many pictures, share of fakes, "
        "and with labels, before and after: ece, F1 at .5 and the best, reliability; null: none",
        "screening": "where `--screen` asked for it: how, numbers of each expert, and whom they make a suspect",
        "factors": "where truncations of single experts are kept: how many this run took, made, and could not keep",
        "statistics": "where running means and variances are not the experts' mean: the file that they are from",
        "output.files": "their bytes",
        "output.bytes": "of all",
        "output.seconds": "of the whole merge",
        WRITTEN: "name → digests of what the merge, and `r2m card`, wrote under it",
    },
    sealed=True,
)
STATE = Record(
    "r2m_state.json",
    "from which another merge takes what it need not find again",
    1,
    {
        "state": "what decides every byte of the output: versions, options, inputs and what tells whether they changed",
        "grams": "by tensor, inner products of task vectors, the base's squared length, and whether factors gave them",
    },
    sealed=True,
)
EVALUATION = Record(
    "evaluation.json",
    "how models did on datasets",
    1,
    {
        "models.*.source": "the checkpoint or the scores",
        "models.*.detector": "how it was loaded",
        "models.*.fake": "the output that was taken for the fake's: index, label, and who says so; null for scores",
        "models.*.calibration": "temperature and bias that r2m calibrate has folded into its classifier; null: none",
        "models.*.preprocessing": "of its pictures",
        "models.*.bytes": "of its files, with those of its adapters; null for scores",
        "models.*.looks_like": "by dataset, of what an ensemble calls fake, whose logit is how often the largest; null",
        "models.*.role": "merge, average (a merge by weight_average), specialist (an expert of one of these); null",
        "models.*.specialists": "of a merge or an average, those that are among the models",
        "models.*.datasets": "by dataset: counts, threshold, metrics over frames and videos, intervals, reliability",
        "models.*.average": "of each metric over the datasets that define it, but that which gave the threshold",
        "models.*.average_intervals": "of those means that have one",
        "models.*.worst": "of each metric, the dataset where it is worst, and the value; null where none defines it",
        "models.*.robustness": "by degradation, metrics over frames by dataset and their means; null: not asked for",
        "differences": "lists model, than, dataset (mean: over all), metric, difference, interval: paired, by video",
        "warnings": "sentences on what looks wrong",
        "settings": "options that decide the numbers",
        "labels": "by dataset, names of folders or of a list's labels that were taken as real, and as fake",
        "left_out": "what of the data is in no dataset: where, what, how many images, why",
        "unreadable": "pictures that were left out, and why",
        "date": "of the evaluation, UTC",
        "versions": "of r2m_kernels, torch, scikit-learn and Python",
    },
)
PAGE = Record(
    "r2m_page.json",
    "of what a page of `r2m report` is made, and what `--overwrite` may replace",
    1,
    {
        "sources": "the merge's output, and the directories of its evaluation and sweep; null: none",
        WRITTEN: "name → digests of what was written under it",
    },
    sealed=True,
)
RECORDS = (REPORT, STATE, EVALUATION, PAGE)


@contextlib.contextmanager
def as_written(what: str) -> Iterator[None]:
    """In the block a file is taken as r2m writes it; one that a stranger has put together is refused where it is not.

    Args:
        what: how error messages name it.

    Raises:
        BadFile: something is not there, or is of another kind than it should be.
    """
    try:
        yield
    except R2MError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        said = printable(f"{type(error).__name__}: {error}")[:_SHOWN]
        raise BadFile(f"{what}: is not as r2m writes it ({said})") from error


def read_evaluation(directory: str | Path) -> dict[str, Any]:
    """What :data:`EVALUATION` holds in a directory, sources as who is elsewhere has them.

    Raises:
        BadFile: it is none.
    """
    what = f"{directory}: {EVALUATION.file}"
    try:
        result = EVALUATION.read(Path(directory), what)
    except OSError:
        raise BadFile(f"{directory}: expected a directory of r2m evaluate, with {EVALUATION.file}") from None
    with as_written(what):
        for one in result["models"].values():
            one["source"] = to_output(directory, one["source"])
    return result
