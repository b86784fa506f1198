"""The page of ``r2m report`` in a browser: 20 models and 12 test sets, on a telephone and wider, light and dark."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

if TYPE_CHECKING:
    from conftest import Result

    Command = Callable[..., Result]

SETS = ("stylegan2", "progan", "stable_diffusion_v_1_4", "stable_diffusion_v_1_5", "midjourney", "ADM", "glide")
SETS += ("wukong", "VQDM", "BigGAN", "celeb_df_faceswap", "deepfacelab_high_quality")
SPECIALISTS = (*SETS, *(f"mixture_{index}" for index in range(5)))
# As DeepfakeBench's folders are called.
EXPERTS = tuple(f"train_on_{name}/clip" for name in SPECIALISTS)
WIDTHS = {390: 844, 1280: 960, 1920: 1080}
SMALLEST = 11  # pixels of a letter
CONTRAST = 4.5  # WCAG's AA

# Everything that is seen on the page, in an iframe of each width, also what has to be opened.
MEASURE = """<!DOCTYPE html><pre id="found"></pre><div id="frames"></div><script>
const numbers = text => text.match(/[\\d.]+/g).map(Number);
const linear = c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
const luminance = rgb => rgb.slice(0, 3).map(c => linear(c / 255))
  .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
function ground(view, element) {
  for (let one = element; one; one = one.parentElement) {
    const rgb = numbers(view.getComputedStyle(one).backgroundColor);
    if (rgb.length < 4 || rgb[3] > 0) return rgb;
  }
  return [255, 255, 255];
}
function measure(frame) {
  const page = frame.contentDocument, view = frame.contentWindow, wide = [], small = [], faint = [];
  page.querySelectorAll("details").forEach(one => one.open = true);
  const most = page.documentElement.clientWidth + .5;  // a scroll bar has its own
  const table = page.querySelector("table.answer").getBoundingClientRect();
  for (const one of page.querySelectorAll("body *")) {
    const box = one.getBoundingClientRect(), name = one.tagName + " " + one.textContent.trim().slice(0, 40);
    const scrolls = one.closest(".scroll, nav ul") && !one.matches(".scroll");
    if (box.width > 0 && !scrolls && (box.right > most || box.left < -.5)) wide.push(name + " " + box.right);
    const says = [...one.childNodes].some(node => node.nodeType == 3 && node.textContent.trim());
    if (!says || !one.getClientRects().length) continue;
    const style = view.getComputedStyle(one), drawn = one.namespaceURI.endsWith("svg");
    const scale = drawn ? Math.hypot(one.getScreenCTM().a, one.getScreenCTM().b) : 1;  // also of what is turned
    const size = parseFloat(style.fontSize) * scale;
    if (size < SMALLEST) small.push(name + " " + size);
    const [ink, paper] = [numbers(drawn ? style.fill : style.color), ground(view, one)].map(luminance);
    const contrast = (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05);
    if (contrast < CONTRAST) faint.push(name + " " + contrast);
  }
  view.scrollTo(0, page.documentElement.scrollHeight);
  const contents = page.querySelector("nav").getBoundingClientRect();
  return {width: page.documentElement.scrollWidth, wide, small, faint, title: page.title,
    sentence: page.querySelector(".says").textContent, table: table.bottom,
    texts: page.querySelectorAll("svg text").length, contents: [contents.top, contents.bottom]};
}
const found = {};
for (const [width, height] of SIZES) {
  const frame = document.createElement("iframe");
  Object.assign(frame, {width, height, src: "page/report.html"});
  frame.style.border = 0;
  frame.onload = () => {
    found[width] = measure(frame);
    document.getElementById("found").textContent = JSON.stringify(found);
  };
  document.getElementById("frames").append(frame);
}</script>"""


def weights(seed: int, scale: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"attn.qkv": (60, 20), "attn.proj": (20, 20), "mlp.fc1": (80, 20), "mlp.fc2": (20, 80)}
    layers = {f"blocks.{layer}.{kind}.weight": shape for layer in range(12) for kind, shape in shapes.items()}
    return {name: torch.randn(shape, generator=generator) * scale for name, shape in layers.items()}


def write_scores(name: str, dice: np.random.Generator) -> None:
    with open(f"{name.replace('/', '-')}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "probability", "dataset"])
        for dataset in SETS:
            quality = 3.0 if dataset in name else 1.5 if name == "merged" else 1.0
            for frame in range(100):
                value = 1 / (1 + np.exp(-quality * (frame % 2 - 0.5) - dice.normal()))
                writer.writerow([f"{dataset}/{frame}.png", frame % 2, round(float(value), 4), dataset])


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> Path:
    """A directory with ``page/report.html`` about 20 models and 12 test sets, from checkpoints and scores."""
    monkeypatch.chdir(tmp_path)
    base, dice = weights(0, 1.0), np.random.default_rng(0)
    save_file(base, "base.safetensors")
    experts: list[str] = []
    for seed, name in enumerate(EXPERTS, start=1):
        Path(name).parent.mkdir(parents=True)
        moved = weights(seed, 0.05)
        save_file({key: value + moved[key] for key, value in base.items()}, f"{name}.safetensors")
        experts += ["--expert", f"{name}={name}.safetensors"]
    assert command("merge", "--base", "base.safetensors", *experts, "--out", "merged", "--quiet").code == 0
    scores: list[str] = []
    for name in ("merged", "average", "base", *EXPERTS):
        write_scores(name, dice)
        scores += ["--scores", f"{name}={name.replace('/', '-')}.csv"]
    assert command("evaluate", *scores, "--out", "evaluated", "--bootstrap", "20", "--quiet").code == 0
    began = time.process_time()
    result = command("report", "merged", "--evaluation", "evaluated", "--to", "page")
    assert (result.code, result.err) == (0, "")
    assert time.process_time() - began < 30
    assert Path("page/report.html").stat().st_size < 3e6
    return tmp_path


def chromium(directory: Path, *arguments: str, dark: bool) -> str:
    scheme = ("--force-dark-mode", "--blink-settings=preferredColorScheme=0") if dark else ()
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={directory}/profile")
    run = subprocess.run(
        ["chromium", *options, "--allow-file-access-from-files", *scheme, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return run.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium: apt-get install chromium")
def test_twenty_models_on_twelve_test_sets_can_be_read(page: Path) -> None:
    values = {"SMALLEST": SMALLEST, "CONTRAST": CONTRAST, "SIZES": json.dumps(list(WIDTHS.items()))}
    text = re.sub("|".join(values), lambda found: str(values[found[0]]), MEASURE)
    page.joinpath("measure.html").write_text(text)
    for dark in (False, True):
        dom = chromium(page, "--virtual-time-budget=30000", "--dump-dom", f"file://{page}/measure.html", dark=dark)
        found: dict[str, Any] = json.loads(re.search(r'<pre id="found">(.*?)</pre>', dom)[1])  # type: ignore[index]
        assert found.keys() == {str(width) for width in WIDTHS}
        for width, height in WIDTHS.items():
            one = found[str(width)]
            assert (one["wide"], one["small"], one["faint"]) == ([], [], []), (width, dark)
            assert one["width"] <= width
            assert one["texts"] > 500  # pictures were measured
            assert "mean AUC over 12 test sets" in one["sentence"]
            top, bottom = one["contents"]  # in sight at the end
            assert abs(top) < 1
            assert abs(bottom - height) < 1 if width > 390 else bottom < 60
        assert found["1280"]["table"] <= WIDTHS[1280]  # sentence and table, before anybody scrolls
        for width, height in WIDTHS.items():
            shot = f"{page}/shot.png"
            size = f"--window-size={max(width, 500)},{height}"  # no window is narrower
            chromium(page, size, f"--screenshot={shot}", f"file://{page}/page/report.html", dark=dark)
            with Image.open(shot) as image:
                pixels = np.asarray(image.convert("L"), dtype=float)
            assert (np.median(pixels) < 128) == dark
            assert pixels.std() > 20  # something is drawn, and can be told from the ground
