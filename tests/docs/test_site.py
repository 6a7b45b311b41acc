"""The site: it builds without a warning, no link of it is broken, it needs no network, and its reference is whole."""

from __future__ import annotations

import ast
import functools
import http.server
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.recipe import entries
from minitron_mcore.verbs import VERBS
from tests.chromium import PROGRAM, Browser
from tests.docs.documents import ROOT

for package in ("sphinx", "myst_nb", "furo", "latex2mathml"):
    pytest.importorskip(package)
DOCS = ROOT / "docs"


def build(out: Path, builder: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As `make docs` does, the notebooks as they are stored: test_notebooks.py runs them."""
    command = [sys.executable, "-m", "sphinx", "-b", builder, "-n", "-q", *arguments, "-d", f"{out}-doctrees", "docs"]
    environment = {**os.environ, "MINITRON_DOCS_NOTEBOOKS": "off", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, str(out)], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site") / "html"
    done = build(out, "html", "-W", "--keep-going")
    assert (done.returncode, done.stderr) == (0, "")
    return out


class Page(HTMLParser):
    """ids: what an anchor can name. links: of <a>. loaded: what a browser fetches to show the page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.navigation: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        said = {name: value or "" for name, value in attributes}
        self.ids |= {said[name] for name in ("id", "name") if name in said}
        if tag == "a" and "href" in said:
            self.links.append(said["href"])
            if "reference internal" in said.get("class", ""):
                self.navigation.append(said["href"])
        elif tag == "link" and said.get("rel") not in ("index", "search", "next", "prev", "canonical"):
            self.loaded.append(said.get("href", ""))
        elif "src" in said:
            self.loaded.append(said["src"])


@functools.cache
def page(path: Path) -> Page:
    return Page(path)


def pages(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


def is_elsewhere(link: str) -> bool:
    return bool(urllib.parse.urlsplit(link).scheme) or link.startswith("//")


def test_every_link_leads_somewhere(site: Path) -> None:
    broken = []
    for path in pages(site):
        for link in {*page(path).links, *page(path).loaded}:
            if is_elsewhere(link):
                continue
            parts = urllib.parse.urlsplit(link)
            target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            anchor = urllib.parse.unquote(parts.fragment)
            if not target.is_file():
                broken.append(f"{path.relative_to(site)} → {link}")
            elif target.suffix == ".html" and anchor and anchor not in page(target).ids:
                broken.append(f"{path.relative_to(site)} → {link}: no such anchor")
    assert broken == []


def test_every_page_is_reached_from_the_table_of_contents(site: Path) -> None:
    sources = {
        path.relative_to(DOCS).with_suffix(".html") for kind in ("md", "ipynb") for path in DOCS.rglob(f"*.{kind}")
    }
    shown = {Path(link.partition("#")[0]) for link in page(site / "index.html").navigation}
    # search.html is the site's own; search-shapes.html is docs/search.md.
    assert sources - shown == {Path("index.html"), Path("search.html")}
    assert "The papers’ grids" in (site / "search-shapes.html").read_text(encoding="utf-8")


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    found = [(path.name, link) for path in pages(site) for link in page(path).loaded if link.startswith(("http", "//"))]
    assert found == []
    for path in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", path.read_text(encoding="utf-8")), path
    scripts = "".join(text for path in pages(site) for text in re.findall(r"<script.*?>", path.read_text("utf-8")))
    assert "mathjax" not in scripts.lower()


def test_equations_are_mathml(site: Path) -> None:
    for path in DOCS.rglob("*.md"):
        count = len(re.findall(r"^\$\$", re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.S), re.MULTILINE))
        made = (site / path.relative_to(DOCS)).with_suffix(".html").read_text(encoding="utf-8")
        assert made.count('display="block"') >= count // 2, path
        assert "\\frac" not in re.sub(r"<pre.*?</pre>|<code.*?</code>", "", made, flags=re.S), path


def test_the_reference_is_whole(site: Path) -> None:
    """Each key and verb, and each name of the Python interface, has an anchor."""
    reference = {name: page(site / "reference" / f"{name}.html").ids for name in ("recipe", "verbs", "api")}
    assert {path for path, _ in entries()} <= reference["recipe"]
    assert VERBS.keys() <= reference["verbs"]
    assert {f"minitron_mcore.api.{name}" for name in public_names()} <= reference["api"]


def public_names() -> set[str]:
    """`__all__` of minitron_mcore.api, which takes seconds to import."""
    path = ROOT / "minitron_mcore" / "api.py"
    path = path if path.exists() else ROOT / "minitron_mcore" / "api" / "__init__.py"
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(node, ast.Assign | ast.AugAssign) and getattr(target, "id", "") == "__all__":
            names |= set(ast.literal_eval(node.value))
    assert names
    return names


def test_keys_and_verbs_in_text_are_links(site: Path) -> None:
    made = (site / "distillation.html").read_text(encoding="utf-8")
    assert 'href="reference/recipe.html#distill.temperature"' in made
    assert 'href="reference/verbs.html#distill"' in made


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """The site, served on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium")
def test_the_search_finds_a_key(address: str) -> None:
    with Browser() as browser:
        browser.call("Page.navigate", url=f"{address}/search.html?q=lr_warmup_iters")
        links: list[str] = []
        deadline = time.monotonic() + 30
        while not any("recipe.html#train.lr_warmup_iters" in link for link in links) and time.monotonic() < deadline:
            time.sleep(0.1)
            links = browser.run("[...document.querySelectorAll('#search-results a')].map(each => each.href)") or []
        assert any(link.endswith("reference/recipe.html#train.lr_warmup_iters") for link in links)


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="no Chromium")
def test_no_page_is_wider_than_a_phone(site: Path) -> None:
    """Nor asks for anything that is not in the site."""
    with Browser() as browser:
        browser.show(390)
        for path in pages(site):
            browser.open(path)
            asked = [event for event in browser.events if event["method"] == "Network.requestWillBeSent"]
            assert {urllib.parse.urlsplit(each["params"]["request"]["url"]).scheme for each in asked} <= {
                "file",
                "data",
            }
            assert browser.run("document.documentElement.scrollWidth") <= 390, path


@pytest.mark.slow
def test_links_to_elsewhere_lead_there(tmp_path: Path) -> None:
    try:
        urllib.request.urlopen("https://arxiv.org/abs/2407.14679", timeout=10).close()
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        pytest.skip(f"no network: {error}")
    done = build(tmp_path / "links", "linkcheck")
    assert done.returncode == 0, done.stdout + done.stderr
