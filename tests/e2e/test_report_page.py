"""The page of a run in a browser: whole without a network, legible in both schemes and on a phone, used by keyboard.

Needs Chromium, which is driven over a pipe (tests/chromium.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.report.gather.report import gather
from minitron_mcore.report.page.render import render
from tests.chromium import NAMES, PROGRAM, Browser
from tests.unit.report.run_folder import write_bench, write_evaluation, write_rounds, write_run, write_search

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=f"needs one of {', '.join(NAMES)}")

SCREENS = [(width, scheme) for width in (1280, 360) for scheme in ("light", "dark")]
# Of each element with text of its own: the contrast of that text with what lies behind it, by WCAG 2's formula.
CONTRASTS = """(() => {
  const channels = text => text.match(/[\\d.]+/g).map(Number);
  const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = rgb => { const [r, g, b] = rgb.map(linear);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const behind = node => { for (; node; node = node.parentElement) {
    const found = channels(getComputedStyle(node).backgroundColor);
    if (found.length == 3 || found[3] == 1) return found.slice(0, 3) } return [255, 255, 255] };
  return [...document.querySelectorAll("body *")].filter(node => !node.closest("title, desc, style, .skip") &&
      [...node.childNodes].some(child => child.nodeType == 3 && child.data.trim()) && node.getClientRects().length
    ).map(node => { const style = getComputedStyle(node), inSvg = node.closest("svg text");
      const [one, other] = [channels(inSvg ? style.fill : style.color), behind(node)].map(c => light(c.slice(0, 3)));
      return [(Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05), node.textContent.trim().slice(0, 30)] })
})()"""
DRAWN = """[...document.querySelectorAll("svg")].map(svg => { const box = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll("text")].map(text => text.getBoundingClientRect());
  return { name: svg.querySelector("title").textContent, width: box.width, height: box.height,
    shapes: svg.querySelectorAll("path, image, use").length,
    smallest: Math.min(...texts.map(text => text.height)),
    outside: texts.filter(t => t.left < box.left - 2 || t.right > box.right + 2 || t.top < box.top - 2 ||
      t.bottom > box.bottom + 2).length,
    overlapping: texts.filter((a, i) => texts.slice(i + 1).some(b =>
      Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
      Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)).length } })"""
FOCUSED = """(() => { const node = document.activeElement, box = node.getBoundingClientRect();
  return [node.tagName, node.className, (node.textContent || "").trim().slice(0, 40), box.width > 0 && box.left >= 0,
    getComputedStyle(node).outlineStyle] })()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has everything."""
    folder = write_run(tmp_path_factory.mktemp("page") / "small")
    write_search(folder / "search")
    write_rounds(folder / "aligned")
    write_bench(write_evaluation(folder / "evaluation"))
    target = folder / "report.html"
    target.write_text(render(gather(folder)))
    return target


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_it_is_whole_and_legible(browser: Browser, page: Path, width: int, scheme: str) -> None:
    browser.show(width, scheme)
    browser.open(page)
    asked = [
        event["params"]["request"]["url"] for event in browser.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith("data:")] == [page.resolve().as_uri()]
    told = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    assert [event for event in browser.events if event["method"] in told] == []
    assert browser.run("document.documentElement.scrollWidth") == width
    contrasts = browser.run(CONTRASTS)
    assert len(contrasts) > 300
    assert [each for each in contrasts if each[0] < 4.5] == []
    drawings: list[dict[str, Any]] = browser.run(DRAWN)
    assert len(drawings) == 23
    for each in drawings:
        assert each["width"] > 0.75 * min(width, 480) and each["height"] > 80 and each["shapes"] > 8, each
        assert each["smallest"] > 9 and not each["outside"] and not each["overlapping"], each


def test_it_is_named_for_those_who_do_not_see_it(browser: Browser, page: Path) -> None:
    """By the browser's own tree of what it tells a screen reader."""
    browser.show(1280)
    browser.open(page)
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]

    def told(role: str) -> list[tuple[str, str]]:
        found = [node for node in nodes if node.get("role", {}).get("value") == role and not node.get("ignored")]
        return [(each.get("name", {}).get("value", ""), each.get("description", {}).get("value", "")) for each in found]

    images = told("img") + told("image")
    assert len(images) == 23 and all(any(character.isdigit() for character in " ".join(image)) for image in images)
    assert [len(told(landmark)) for landmark in ("main", "navigation", "banner", "contentinfo")] == [1, 1, 1, 1]
    headings = browser.run("[...document.querySelectorAll('h1, h2, h3')].map(node => node.tagName)")
    assert headings[0] == "H1" and {*headings[1:]} == {"H2"}
    assert browser.run("document.documentElement.lang") == "en" and browser.run("document.title").startswith(
        "small: report"
    )
    assert browser.run("[...document.querySelectorAll('table')].every(t => t.caption && t.querySelector('th[scope]'))")


def test_the_keyboard_reaches_everything(browser: Browser, page: Path) -> None:
    browser.show(1280)
    browser.open(page)
    browser.press("Tab")
    tag, kind, text, seen, outline = browser.run(FOCUSED)
    assert (tag, kind, seen, outline) == ("A", "skip", True, "solid") and text == "Skip to the content"
    visited: list[str] = []
    while len(visited) < 80:
        browser.press("Tab")
        tag, kind, text, seen, outline = browser.run(FOCUSED)
        if tag == "BODY":
            break
        assert outline == "solid", (tag, text)
        visited.append(tag)
    links, folded = (browser.run(f"document.querySelectorAll('{name}').length") for name in ("nav a", "summary"))
    assert visited.count("A") == links and visited.count("SUMMARY") == folded > 3
    # A closed part opens by the key that is pressed on it.
    browser.run("document.querySelector('summary').focus()")
    browser.press("Enter")
    assert browser.run("document.querySelector('details').open")


def test_it_is_whole_on_paper(browser: Browser, page: Path) -> None:
    """A4, of a reader whose screen is dark: white, no wider than the sheet, what they opened in full, nothing else."""
    width = 718  # CSS pixels of 210 mm within Chromium's margins
    browser.show(width, "dark")
    browser.open(page)
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.call("Emulation.setEmulatedMedia", media="print", features=dark)
    try:
        assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert [each for each in browser.run(CONTRASTS) if each[0] < 4.5] == []
        assert browser.run("document.documentElement.scrollWidth") == width
        assert browser.run("[...document.querySelectorAll('details')].every(d => !d.getClientRects().length)")
        browser.run("document.querySelectorAll('details').forEach(details => details.open = true)")
        cut = "(node => node.scrollHeight > node.clientHeight || node.scrollWidth > node.clientWidth)"
        assert browser.run("Math.max(...[...document.querySelectorAll('pre')].map(pre => pre.scrollHeight))") > 600
        assert browser.run(f"[...document.querySelectorAll('pre, .scroll')].filter({cut}).length") == 0
        assert browser.run("document.documentElement.scrollWidth") == width
        assert browser.run("getComputedStyle(document.querySelector('h2')).breakAfter") == "avoid"
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")
