"""The HTML page in a real browser: it renders, its script runs, nothing sticks out."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.zoo import compiled, make, train_step
from tools.inspect_pictures import FLAGS, browser, screenshot

PROBE = """
<script>
addEventListener("load", () => {
  const wide = [...document.querySelectorAll("section, .card, .bar-top, svg.layers")]
    .filter((e) => !e.hidden && e.getBoundingClientRect().right > innerWidth + 1).length;
  const button = document.querySelector('[data-set-method="dfa"]');
  button.click();
  const shown = [...document.querySelectorAll("[data-if-method]")]
    .filter((e) => !e.hidden).map((e) => e.dataset.ifMethod);
  const bar = document.querySelector(".bar");
  bar.dispatchEvent(new PointerEvent("pointermove", { bubbles: true, clientX: 9, clientY: 9 }));
  document.title = ["probe", innerWidth, wide, document.documentElement.scrollWidth,
    [...new Set(shown)].join("+"), document.getElementById("tip").hidden].join(" ");
});
</script>
"""


@pytest.fixture(scope="module")
def chromium():
    """A Chromium's path."""
    path = browser()
    if path is None:
        pytest.skip("no Chromium is installed")
    return path


def dom(chromium, page, tmp_path, width):
    """The page's DOM after its scripts ran."""
    done = subprocess.run(
        [
            chromium,
            *FLAGS,
            f"--user-data-dir={tmp_path}/profile",
            f"--window-size={width},900",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("width", [1280, 500])
def test_page_runs(chromium, mlp_report, tmp_path, width):
    page = tmp_path / "report.html"
    page.write_text(mlp_report.html().replace("</body>", PROBE + "</body>"), encoding="utf-8")
    found = re.search(r"<title>probe (\d+) (\d+) (\d+) (\S+) (\S+)</title>",
                      dom(chromium, page, tmp_path, width))  # fmt: skip
    assert found, "the script did not finish"
    inner, sticking_out, scroll, shown, tip_hidden = found.groups()
    assert sticking_out == "0" and int(scroll) <= int(inner)
    assert shown == "dfa"  # the button switched every section
    assert tip_hidden == "false"  # hovering a bar shows its details


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_screenshot(chromium, mlp_report, tmp_path, width, dark):
    image = pytest.importorskip("PIL.Image")
    page, picture = tmp_path / "report.html", tmp_path / "shot.png"
    page.write_text(mlp_report.html(), encoding="utf-8")
    screenshot(page, picture, width, 800, dark)
    with image.open(picture) as shot:
        assert shot.size == (width, 800)
        background = shot.convert("RGB").getpixel((3, 400))
        colours = len(shot.convert("RGB").getcolors(1 << 20) or ())
    assert (sum(background) < 200) is dark
    assert colours > 100  # more than an empty page


def test_training_page_fits(chromium, tmp_path):
    """``net.report().html()``: both charts are drawn, and nothing sticks out on a narrow screen."""
    net = compiled(make("mlp")[0], "grape", calib_every=1)
    net.record()
    for epoch in range(4):
        net.set_epoch(epoch // 2)
        train_step(net, make("mlp")[1])
    probe = (
        '<script>addEventListener("load", () => { document.title = ["probe", '
        'document.querySelectorAll(".chart path").length, '
        "document.documentElement.scrollWidth <= innerWidth].join(' '); });</script>"
    )
    page = tmp_path / "training.html"
    page.write_text(net.report().html().replace("</body>", probe + "</body>"), encoding="utf-8")
    found = re.search(r"<title>probe (\d+) (\w+)</title>", dom(chromium, page, tmp_path, 500))
    curves = sum(len(c) for c in net.report().curves.values())
    assert found and found.groups() == (str(curves), "true")
