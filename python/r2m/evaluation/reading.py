"""Data that detectors are judged on, from wherever it lies."""

from __future__ import annotations

from pathlib import Path

from r2m.evaluation.data import Data
from r2m.evaluation.folders import read_folders
from r2m.evaluation.lists import read_list
from r2m.evaluation.request import Request
from r2m_kernels.errors import BadFile, BadOption, quoted


def read_data(path: str | Path, request: Request) -> Data:
    """Datasets in one place.

    Args:
        path: a directory or a list, as a row of :data:`r2m.evaluation.layouts.LAYOUTS` says.
        request: how.

    Raises:
        InvalidInput: no such file, not of these forms, or nothing in it.
    """
    if Path(path).is_dir():
        if request.deepfakebench_compat:
            raise BadOption(f"data ({path}): --deepfakebench-compat is for lists of DeepfakeBench, this is a directory")
        return read_folders(Path(path), request)
    if not Path(path).is_file():
        raise BadFile(f"data ({path}): no such file or directory")
    return read_list(Path(path), request)


def read_all(request: Request) -> Data:
    """What ``--data`` names, together; a dataset that another place has too is called by its place as well.

    Raises:
        InvalidInput: as of :func:`read_data`, or a place is given twice.
    """
    whole = Data()
    seen = set()
    for path in request.data:
        place = Path(path).resolve()
        if place in seen:
            raise BadOption(f"data ({path}): is given twice")
        seen.add(place)
        one = read_data(path, request)
        for name, dataset in one.datasets.items():
            known = name if name not in whole.datasets else f"{place.stem}/{name}"
            if known in whole.datasets:
                raise BadOption(f"data ({path}): there is a dataset {quoted(known)} already")
            whole.datasets[known] = dataset
        whole.left_out.extend(one.left_out)
        whole.notes.extend(one.notes)
    return whole
