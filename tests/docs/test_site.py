"""The documentation as a site: it builds strictly, its links lead somewhere, a browser shows it."""

from __future__ import annotations

import html.parser
import importlib.util
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

import pytest
from PIL import Image

from tools.inspect_pictures import browser, screenshot

ROOT = Path(__file__).resolve().parents[2]


class Links(html.parser.HTMLParser):
    """What a page refers to, what it loads, and the anchors that it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {v for k in ("id", "name") if (v := found.get(k))}
        if tag == "a" and (href := found.get("href")):
            self.links.append(href)
        if (source := found.get("src")) or (
            tag == "link"
            and found.get("rel") in ("stylesheet", "icon")
            and (source := found["href"])
        ):
            self.loads.append(source)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as ``make docs`` builds it."""
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("needs mkdocs-material: pip install 'grapefx[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_link_leads_somewhere(site: Path) -> None:
    pages = {page: Links(page) for page in site.rglob("*.html") if page.name != "404.html"}
    assert len(pages) > 30
    wrong = []
    for page, found in pages.items():
        for link in (*found.links, *found.loads):
            path, anchor = urldefrag(link)
            if urlparse(link).scheme:
                continue
            target = (page.parent / unquote(path)).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                wrong.append(f"{page.relative_to(site)}: {link}")
            elif anchor and target in pages and unquote(anchor) not in pages[target].anchors:
                wrong.append(f"{page.relative_to(site)}: no anchor {link}")
    assert not wrong, "\n".join(wrong)


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not [source for source in Links(page).loads if urlparse(source).netloc], page


def test_every_page_is_reached_from_the_navigation_or_a_page(site: Path) -> None:
    pages = {page: Links(page) for page in site.rglob("*.html") if page.name != "404.html"}
    reached = {
        (page.parent / unquote(urldefrag(link)[0])).resolve()
        for page, found in pages.items()
        for link in found.links
    }
    assert {p.parent.resolve() for p in pages} - reached <= {site.resolve()}


def test_the_reference_has_what_users_call(site: Path) -> None:
    anchors = Links(site / "reference" / "index.html").anchors
    for name in (
        "grapefx.compile", "grapefx.restore", "grapefx.inspect", "grapefx.methods.Method",
        "grapefx.runtime.module.FeedbackModule.report",
        "grapefx.integrations.lightning.FeedbackCallback",
        "grapefx.integrations.huggingface.attach", "grapefx.errors.StateError",
    ):  # fmt: skip
        assert name in anchors


@pytest.mark.parametrize("page", ["", "concepts", "reference"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it(site: Path, tmp_path: Path, page: str, width: int) -> None:
    if browser() is None:
        pytest.skip("no Chromium is installed")
    shot = tmp_path / "page.png"
    screenshot(site / page / "index.html", shot, width, 900, dark=False)
    colours = Image.open(shot).convert("RGB").resize((100, 100)).getcolors(10_000)
    assert colours is not None and len(colours) > 20  # more than a blank page
