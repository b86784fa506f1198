"""Frames of video files, evenly spread over them and upright, as players show them; decoded by FFmpeg through PyAV."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from r2m.extras import need
from r2m_kernels.errors import printable

# Containers that hold pictures themselves: a playlist under such a name would have FFmpeg open whatever it lists.
_OPENED = {
    "format_whitelist": "mov,mp4,avi,matroska,webm,mpeg,mpegvideo,mpegts,asf,flv",
    "protocol_whitelist": "file",
}
SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv")


@dataclass(frozen=True)
class Still:
    """A frame of a video file.

    Attributes:
        number: among all its frames, from 0.
        seconds: when it is shown.
        image: in RGB.
    """

    number: int
    seconds: float
    image: Image.Image


def stills(path: Path, count: int) -> Iterator[Still | str]:
    """At most so many frames of a video, spread as :func:`spread` has it; last, if it is so, why there are not more.

    Args:
        path: of the file.
        count: of frames.

    Raises:
        BadOption: PyAV is not installed.
    """
    need(str(path), "video", "av")
    import av

    try:
        with av.open(f"file:{path.absolute()}", options=_OPENED) as container:
            if not container.streams.video:
                yield "no video in it"
                return
            yield from _decoded(container, container.streams.video[0], count)
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        yield "no such file" if isinstance(error, FileNotFoundError) else f"not a readable video: {printable(reason)}"


def spread(total: int, count: int) -> list[int]:
    """Places of at most so many of a number of frames, evenly spread."""
    return [index * total // count for index in range(count)] if total > count else list(range(total))


def _decoded(container: Any, stream: Any, count: int) -> Iterator[Still | str]:
    packets = [packet for packet in container.demux(stream) if packet.size]
    wanted = spread(len(packets), count)
    timed = all(packet.pts is not None for packet in packets)
    found = 0
    for still in _by_time(container, stream, packets, wanted) if timed else _by_number(container, stream, wanted):
        found += 1
        yield still
    if found < max(len(wanted), 1):
        yield f"only {found} of {len(wanted)} frames can be decoded" if wanted else "no frames in it"


def _by_time(container: Any, stream: Any, packets: Sequence[Any], wanted: Sequence[int]) -> Iterator[Still]:
    """Frames at the times of their packets; what lies before a key frame need not be decoded."""
    times = sorted(packet.pts for packet in packets)  # packets lie in the order in which they are decoded
    keys = {packet.pts: packet.pts if packet.dts is None else packet.dts for packet in packets if packet.is_keyframe}
    starts = sorted(keys) or times[:1]
    frames: Iterator[Any] = iter(())
    position: int | None = None
    for number in wanted:
        start = starts[max(bisect_right(starts, times[number]) - 1, 0)]
        if position is None or start > position:
            frames = _from(container, stream, keys.get(start, start), times[number])
        frame = next((one for one in frames if one.pts is not None and one.pts >= times[number]), None)
        if frame is None:
            return
        position = frame.pts
        yield _still(number, (times[number] - times[0]) * stream.time_base, frame)


def _from(container: Any, stream: Any, start: int, least: int) -> Iterator[Any]:
    """Frames from a key frame on; from the first where a file's index leads beyond what is to be seen."""
    for place in (start, stream.start_time or 0):
        container.seek(place, stream=stream)
        frames = container.decode(stream)
        first = next(frames, None)
        if first is not None and first.pts is not None and first.pts <= least:
            break
    return itertools.chain([] if first is None else [first], frames)


def _by_number(container: Any, stream: Any, wanted: Sequence[int]) -> Iterator[Still]:
    """Frames by counting all of them: of files that do not say when each is shown, such as AVI's."""
    container.seek(0)
    left = set(wanted)
    for number, frame in enumerate(container.decode(stream)):
        if number in left:
            yield _still(number, number / stream.average_rate if stream.average_rate else 0, frame)


def _still(number: int, seconds: Any, frame: Any) -> Still:
    image = frame.to_image()
    return Still(number, float(seconds), image.rotate(frame.rotation, expand=True) if frame.rotation else image)
