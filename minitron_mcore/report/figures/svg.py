"""A matplotlib figure as inline SVG that takes its colours and its type from the page. Pure.

Colours are drawn as marks, hexadecimal numbers that stand for nothing else, which become CSS variables: so one figure
serves the light and the dark page. Text stays text. The same figure gives the same bytes.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GRID = "#010201", "#010202", "#010203"
SERIES = tuple(f"#0102{16 + place:02x}" for place in range(8))
_STYLES = {INK: "currentColor", FAINT: "var(--faint)", GRID: "var(--grid)"}
_STYLES |= {mark: f"var(--series-{place})" for place, mark in enumerate(SERIES)}
WIDTH = 4.3  # inches, which are 72 units of the drawing each
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "minitron",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.labelsize": 9.5,
    "legend.fontsize": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "axes.edgecolor": FAINT,
    "grid.color": GRID,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.use_mathtext": False,
    "path.simplify_threshold": 0.3,
}


@contextmanager
def drawing(height: float, width: float = WIDTH) -> Iterator[Figure]:
    """An empty figure, of so many inches; what is set up within the `with` looks like all others."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {**matplotlib.rcParamsDefault, **_SETTINGS}  # type: ignore[dict-item]
    del settings["backend"]  # which would be loaded
    with matplotlib.rc_context(settings):
        yield Figure(figsize=(width, height), layout="constrained")


def color(place: int) -> str:
    return SERIES[place % len(SERIES)]


def count_axis(panel: Axes, axis: str) -> None:
    """Ticks as 10k, 2M; of a logarithmic axis below a hundredfold, also at 2 and 5 times the powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    shown = getattr(panel, f"{axis}axis")
    low, high = getattr(panel, f"get_{axis}lim")()
    is_log = shown.get_scale() == "log"
    subs = (1.0, 2.0, 5.0) if is_log and high < 100 * low else (1.0,)
    shown.set_major_locator(LogLocator(subs=subs) if is_log else MaxNLocator(nbins=6))
    shown.set_major_formatter(FuncFormatter(lambda value, _: count_words(value, digits=4)))
    shown.set_minor_locator(NullLocator())


def count_words(value: float, digits: int = 3) -> str:
    """2048000 -> "2.05M"."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.{digits}g}{letter}"
    return f"{value:.{digits}g}"


def inline(name: str, figure: Figure, title: str, description: str) -> str:
    """The `<svg>` element, whose ids begin with `name`. title, description: what it shows, for those who do not see it;
    call it within `drawing`."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    written = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(written, metadata={"Date": None})
    ET.register_namespace("", _SVG)
    root = ET.fromstring(written.getvalue())
    _, _, width, height = root.attrib["viewBox"].split()
    for each in ("width", "height", "version"):
        root.attrib.pop(each, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-desc", "data-size": f"{width} {height}"}
    for child in [*root]:
        # What it says of its maker; and a rule of style, which would hold for the whole page.
        if child.tag == f"{{{_SVG}}}metadata" or child.find(f"{{{_SVG}}}style") is not None:
            root.remove(child)
    _name_ids(root, name)
    for element in root.iter():
        _restyle(element)
    for place, (tag, words) in enumerate((("title", title), ("desc", description))):
        told = ET.Element(f"{{{_SVG}}}{tag}", {"id": f"{name}-{tag}"})
        told.text = words
        root.insert(place, told)
    return ET.tostring(root, encoding="unicode")


def _name_ids(root: ET.Element, name: str) -> None:
    """Keep the ids that something refers to, under names that no other figure has."""
    text = ET.tostring(root, encoding="unicode")
    used = {*re.findall(r"url\(#([^)]+)\)", text), *re.findall(r'href="#([^"]+)"', text)}
    names = {each: f"{name}-{place}" for place, each in enumerate(sorted(used))}
    for element in root.iter():
        if (own := element.attrib.pop("id", None)) in names:
            element.attrib["id"] = names[own]
        if href := element.attrib.pop(f"{{{_XLINK}}}href", None):
            element.attrib["href"] = f"#{names[href[1:]]}" if href.startswith("#") else "".join(href.split())
        if clip := element.attrib.get("clip-path"):
            element.attrib["clip-path"] = re.sub(r"#([^)]+)", lambda found: f"#{names[found[1]]}", clip)


def _restyle(element: ET.Element) -> None:
    """CSS variables for marks, the page's own type, and no more digits than a screen has."""
    if element.text and not element.text.strip():
        element.text = None
    element.tail = None
    if style := element.attrib.get("style"):
        style = re.sub(r"font: [^;]*?([\d.]+px) [^;]*", r"font-size: \1", style)
        style = re.sub(r"font-family: [^;]*;?", "", style)
        for mark, value in _STYLES.items():
            style = style.replace(mark, value)
        element.attrib["style"] = style.strip().rstrip(";")
    for each in ("d", "x", "y", "transform", "width", "height"):
        if text := element.attrib.get(each):
            text = re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", text)
            element.attrib[each] = " ".join(text.split())
