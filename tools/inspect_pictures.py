"""Makes docs/img/*.png: what grapefx-inspect and net.report() show, in Chromium and by graphviz.

python -m tools.inspect_pictures [--only NAME]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

import grapefx
from grapefx.report.cli import main as inspect_main
from tools import ROOT
from tools.common import cli
from tools.common.data import load_images
from tools.common.networks import initialise, mlp

IMAGES = ROOT / "docs" / "img"
MODEL = f"{ROOT / 'tools' / 'inspect_models.py'}:mlp"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]

# what is kept of a picture: its rows
ROWS = {"inspect-chain-and-fan": (744, 1396)}
# name -> (page, width, height, dark)
SHOTS = {
    "inspect-chain-and-fan": ("mlp", 1280, 1400, False),
    "inspect-wide": ("mlp", 1280, 1560, False),
    "inspect-wide-dark": ("resnet18", 1280, 1100, True),
    "inspect-phone": ("mlp", 390, 1500, False),
    "inspect-phone-dark": ("mlp", 390, 900, True),
    "training-report": ("training", 1100, 1200, False),
}


def browser() -> str | None:
    """The path of a Chromium, or None."""
    return next((path for b in BROWSERS if (path := shutil.which(b))), None)


def screenshot(page: Path, to: Path, width: int, height: int, dark: bool) -> None:
    """A picture of a page. Narrow pages are shown in a frame: a window is never under 500 px."""
    program = browser()
    if program is None:
        raise SystemExit("no Chromium is installed")
    with tempfile.TemporaryDirectory() as profile:
        theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
        if width < 500:
            frame = Path(profile) / "frame.html"
            frame.write_text(
                f'<body style="margin:0"><iframe src="{page.resolve().as_uri()}" '
                f'style="width:{width}px;height:{height}px;border:0;display:block"></iframe>'
            )
            page = frame
        flags = [*FLAGS, *theme, "--allow-file-access-from-files", f"--user-data-dir={profile}/p"]
        subprocess.run(
            [
                program,
                *flags,
                f"--window-size={max(width, 500)},{height}",
                f"--screenshot={to.resolve()}",
                page.resolve().as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )
    if width < 500:
        _crop(to, (0, 0, width, height))


def _crop(picture: Path, box: tuple[int, int, int, int]) -> None:
    from PIL import Image

    with Image.open(picture) as whole:
        whole.crop(box).save(picture, optimize=True)


def _inspect(*arguments: str) -> None:
    if inspect_main(arguments) != 0:
        raise SystemExit(f"grapefx-inspect {' '.join(arguments)} failed")


def _train(page: Path) -> None:
    """A page of ``net.report()``: an MLP of 8 layers, three epochs on the bundled digits."""
    torch.manual_seed(0)
    data = load_images()
    model = mlp((1, 28, 28), data.classes, 8, 128, "relu", False)
    initialise(model, "he_uniform")
    net = grapefx.compile(model, method="grape", backend="eager")
    net.record()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for epoch in range(3):
        net.set_epoch(epoch)
        for index in torch.randperm(5120).split(128):
            x, y = data.pixels(data.train_x[index]), data.train_y[index]
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    page.write_text(net.report().html(), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Write every picture."""
    parser = cli.parser("tools.inspect_pictures", __doc__)
    parser.add_argument("--only", choices=[*SHOTS, "inspect-graph"])
    only = parser.parse_args(argv).only
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pages = {key: Path(folder) / f"{key}.html" for key in ("mlp", "resnet18", "training")}
        wanted = {n: s for n, s in SHOTS.items() if only in (None, n)}
        calibration = ["--calib-every", "1", "--steps-per-epoch", "390"]
        sources = {"mlp": MODEL, "resnet18": "torchvision:resnet18"}
        for key in {s[0] for s in wanted.values()}:
            if key == "training":
                _train(pages[key])
            else:
                _inspect(sources[key], *calibration, "-o", str(pages[key]))
        for name, (key, width, height, dark) in wanted.items():
            picture = IMAGES / f"{name}.png"
            screenshot(pages[key], picture, width, height, dark)
            if name in ROWS:
                _crop(picture, (0, ROWS[name][0], width, ROWS[name][1]))
        if only in (None, "inspect-graph"):
            _inspect(MODEL, "--method", "dfa", "-o", str(IMAGES / "inspect-graph.png"))
    for path in sorted(IMAGES.glob("*-*.png")):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1024} KiB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
