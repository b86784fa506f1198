"""What ``r2m evaluate`` may be told, each option declared once; without torch, for the command's help."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from r2m.detector_kinds import WHAT
from r2m.evaluation.layouts import LAYOUTS
from r2m.presets import PRESETS
from r2m_kernels.errors import BadOption
from r2m_kernels.options import Option, documented, normalize, option, read_options

MODELS, DATA, JUDGING, RUN = "Models", "Data", "Judging", "Running"


@dataclass(frozen=True)
class Request:
    """Which models are judged on which data, and how.

    Raises:
        BadOption: a value that an option may not have.
    """

    merged: tuple[str, ...] = option((), MODELS, "The output of a merge, to run beside its specialists.", metavar="OUT")
    models: tuple[str, ...] = option((), MODELS, "A checkpoint to run.", flag="model", metavar="[NAME=]PATH")
    adapters: tuple[str, ...] = option(
        (),
        MODELS,
        "The output of merge --format adapters: the mean logit of its model with each adapter, and each alone.",
        metavar="[NAME=]DIR",
    )
    detector: str | None = option(
        None,
        MODELS,
        WHAT,
        metavar="KIND",
        unset="as the merge's recipe or files beside the checkpoint say",
    )
    fake: int | None = option(
        None,
        MODELS,
        "Which of two outputs stands for fake, 0 or 1.",
        metavar="INDEX",
        unset="as the recipe or config.json says, else 1",
    )
    preset: str | None = option(None, MODELS, "Names of the checkpoints' tensors, as of merge.", choices=tuple(PRESETS))
    scores: tuple[str, ...] = option(
        (),
        MODELS,
        "Finished scores of a model: columns path, label, probability, and video, dataset if there.",
        metavar="[NAME=]CSV",
    )
    size: int | None = option(None, MODELS, "Pixels of a side.", unset="as the checkpoint's directory says")
    mean: str | None = option(
        None, MODELS, "Of the channels.", unset="as the checkpoint's directory says", metavar="R,G,B"
    )
    std: str | None = option(
        None, MODELS, "Of the channels.", unset="as the checkpoint's directory says", metavar="R,G,B"
    )
    data: tuple[str, ...] = option(
        (),
        DATA,
        f"A directory with reals and fakes in it, or a list: as of {'; '.join(one.suites for one in LAYOUTS[2:])}.",
        metavar="PATH",
    )
    root: str | None = option(None, DATA, "Of the paths in lists.", unset="the file's directory", metavar="DIR")
    split: Literal["train", "val", "test"] = option(
        "test", DATA, "Which part is judged, where there are several; val where there is no test."
    )
    compression: str = option("c23", DATA, "Of FaceForensics++ in JSON files.")
    labels: tuple[str, ...] = option(
        (),
        DATA,
        "What a folder's name or a list's label is: real or fake.",
        flag="label",
        unset="by its words",
        metavar="NAME=0|1",
    )
    subfolders: Literal["auto", "video", "generator", "none"] = option(
        "auto",
        DATA,
        "What folders inside real and fake are: a video each, a generator each, or nothing; auto: by their depth.",
    )
    frames: int = option(32, DATA, "Of a video, at most, spread.", minimum=1)
    strict: bool = option(False, DATA, "An image that cannot be read ends it, where it would be left out and told.")
    deepfakebench_compat: bool = option(
        False,
        DATA,
        "The first frames of a video by number, and videos known by their folder's name, as DeepfakeBench has it.",
    )
    threshold: float | None = option(
        None, JUDGING, "Fake is what has a higher probability.", unset="0.5", metavar="P", minimum=0
    )
    threshold_from: str | None = option(
        None,
        JUDGING,
        "Choose each model's threshold on this dataset, which is then out of means and worst.",
        metavar="DATASET",
    )
    threshold_by: Literal["balanced_acc", "eer", "fpr_1", "fpr_5"] = option(
        "balanced_acc", JUDGING, "How it is chosen: where that is best, or so many per cent of reals are called fake."
    )
    against: tuple[str, ...] = option(
        (),
        JUDGING,
        "The model that all others are compared with.",
        unset="a merge with its specialists and their average, else the first",
        metavar="NAME",
    )
    robustness: bool = option(
        False,
        JUDGING,
        "Also judge on pictures that were compressed, made smaller, blurred or noisy: ten times the time.",
    )
    table: Literal["text", "markdown", "csv", "latex"] = option(
        "text", JUDGING, "How the table is printed; all but text are also written into --out."
    )
    columns: str | None = option(
        None,
        JUDGING,
        "Of the table: names of metrics with commas, such as auc,video_eer.",
        metavar="NAMES",
        unset="a few",
    )
    bootstrap: int = option(1000, RUN, "Resamples of videos.", minimum=0)
    seed: int = option(0, RUN, "Of the resamples.")
    batch: int = option(32, RUN, "Images at a time.", minimum=1)
    device: str = option("cpu", RUN, "cpu, cuda, cuda:1.")

    def __post_init__(self) -> None:
        normalize(self, REQUEST)
        if self.threshold is not None and self.threshold > 1:
            raise BadOption(f"--threshold {self.threshold:g}: expected a probability, from 0 to 1")
        if self.threshold is not None and self.threshold_from is not None:
            raise BadOption("--threshold and --threshold-from: expected one of them, got both")
        _ = self.values  # checked

    @functools.cached_property
    def values(self) -> dict[str, int]:
        """What the names in ``labels`` are: 0 real, 1 fake."""
        values = {}
        for text in self.labels:
            name, _, value = text.rpartition("=")
            if not name or value not in ("0", "1"):
                raise BadOption(f"--label {text}: expected NAME=0 (real) or NAME=1 (fake)")
            values[name] = int(value)
        return values


REQUEST: dict[str, Option] = read_options(Request)
Request.__doc__ = documented(Request, REQUEST)
# Those that pictures without labels have too.
DETECT = ("detector", "fake", "preset", "size", "mean", "std", "frames", "threshold", "batch", "device")
