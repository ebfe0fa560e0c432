"""How every figure looks: one palette for light and dark, one typeface, one way to be written.

A figure is drawn once, in the colours of the light palette. On the page each of them becomes a
CSS variable, so that the same drawing follows the reader's light or dark setting.
"""

import base64
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float64]
# name -> (light, dark). The light ones have to differ: they stand for the names in a drawing.
PALETTE = {
    "paper": ("#fefefd", "#14161a"),
    "ink": ("#191b20", "#e7e9ec"),
    "muted": ("#646a75", "#9aa2ad"),
    "rule": ("#dcdfe4", "#31363e"),
    "wash": ("#f4f5f6", "#1d2026"),
    "accent": ("#245fb0", "#82b4f7"),
    "alarm": ("#a4372a", "#f0998c"),
    "s0": ("#2a66b8", "#7db2f5"),
    "s1": ("#bf5b04", "#f0a45f"),
    "s2": ("#16856a", "#58c9a6"),
    "s3": ("#8447b8", "#c39cf2"),
    "s4": ("#bd3350", "#f48ba0"),
    "s5": ("#8a6d00", "#dcbb4b"),
    "s6": ("#167f9e", "#6bcbe6"),
    "s7": ("#7a5547", "#cda593"),
}
COLOUR = {name: light for name, (light, _) in PALETTE.items()}
SERIES = [COLOUR[f"s{n}"] for n in range(8)]
MARKERS = "osD^vPX*"
WIDTH = 5.4  # inches of 72 CSS pixels: about a telephone's width, where text keeps its size
DPI = 150
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.parse_math": False,  # names of models and methods may hold dollar signs
    "text.color": COLOUR["ink"],
    "axes.labelcolor": COLOUR["muted"],
    "axes.edgecolor": COLOUR["rule"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "grid.color": COLOUR["rule"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOUR["rule"],
    "ytick.color": COLOUR["rule"],
    "xtick.labelcolor": COLOUR["muted"],
    "ytick.labelcolor": COLOUR["muted"],
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "ytick.major.size": 0,
    "figure.facecolor": COLOUR["paper"],
    "savefig.facecolor": COLOUR["paper"],
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.4,
    "legend.borderaxespad": 0,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "llm-narrow",
}
HEAT = LinearSegmentedColormap.from_list(
    "heat", [(0.93, 0.95, 0.98), (0.62, 0.76, 0.92), (0.20, 0.45, 0.74), (0.03, 0.17, 0.38)]
)


@dataclass(frozen=True)
class Drawn:
    """A finished figure: for the page, as files, and in words for who cannot see it."""

    name: str
    title: str
    caption: str
    alt: str
    inline: str  # SVG whose colours are CSS variables
    svg: str  # in light colours, for other documents
    png: bytes


@contextmanager
def styled() -> Iterator[None]:
    """Inside, everything is drawn in our style; missing glyphs of foreign names are no warning."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        warnings.filterwarnings("ignore", "Matplotlib currently does not support")
        yield


def sheet(height: float, **given: Any) -> tuple[Figure, Any]:
    """An empty figure, `height` in inches, with its axes as `Figure.subplots(**given)` gives them.

    Without pyplot, which would keep every figure for as long as the process lives.
    """
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.05, hspace=0.05)  # type: ignore[union-attr,call-arg]
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**given)


def finished(figure: Figure, name: str, *, title: str, caption: str, alt: str) -> Drawn:
    """Write the figure out in all its forms."""
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    figure.set_layout_engine("none")  # it is laid out; a second time would only cost
    figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg.getvalue())
    text = re.sub(r"<[^>]*>", _coarser, text)
    return Drawn(name, title, caption, alt, themed(text, name), text, png.getvalue())


def themed(svg: str, name: str) -> str:
    """The drawing as part of a page: without what belongs to a file, its colours as variables.

    `name` keeps its ids apart from those of the other figures on the page.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    for colour, (light, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--{colour})")
    svg = re.sub(r"<image[^>]*/>", _both, svg)
    return re.sub(r">\s+<", "><", svg)


def dark(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGBA pixels, (height, width, 4), of the same hues with light and dark changed over."""
    colour = pixels[..., :3].astype(np.float64)
    luma = colour @ np.array([0.2126, 0.7152, 0.0722])
    turned = np.clip(colour + 255 - 2 * luma[..., None], 0, 255).astype(np.uint8)
    return np.concatenate([turned, pixels[..., 3:]], axis=-1)


def _coarser(tag: re.Match[str]) -> str:
    """A tag whose coordinates are cut to hundredths of a pixel; texts stand between tags."""
    return re.sub(r"(\.\d\d)\d+", r"\1", tag[0])


def _both(image: re.Match[str]) -> str:
    """A picture inside a drawing, followed by its counterpart for dark pages."""
    data = re.search(r'"data:image/png;base64,([^"]*)"', image[0])
    if data is None:
        return image[0]
    with Image.open(io.BytesIO(base64.b64decode(data[1]))) as light:
        pixels = np.asarray(light.convert("RGBA"))
    out = io.BytesIO()
    Image.fromarray(dark(pixels)).save(out, format="png", optimize=True)
    other = image[0].replace(data[1], base64.b64encode(out.getvalue()).decode())
    return image[0].replace("<image", '<image class="light"') + other.replace(
        "<image", '<image class="dark"'
    )


def short(value: float, _: object = None) -> str:
    """`134.5 M` of 134,515,008; small numbers as they are."""
    size = abs(value)
    for limit, letter in ((1e18, " E"), (1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"),
                          (1e3, " k")):  # fmt: skip
        if size >= limit * 0.9995:
            scaled = value / limit
            return f"{scaled:.3g}{letter}" if abs(scaled) < 999.5 else f"{scaled:,.0f}{letter}"
    return f"{value:.3g}"


def crossed(text: str) -> str:
    """`1.45 x` and `-0.42` with their proper signs."""
    return re.sub(r"^-(?=\d)", "\u2212", re.sub(r"(?<=\d) x$", "\u00d7", text))


def visible(text: object) -> str:
    """Text that can stand in HTML and SVG: control characters by their pictures, no lone halves."""
    shown = str(text).encode("utf-8", "replace").decode("utf-8")
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]",
        lambda m: "" if m[0] == "\r" else _picture(ord(m[0])),
        shown,
    )


def _picture(code: int) -> str:
    return chr(0x2400 + code) if code < 0x20 else "\ufffd"


def named(text: object, limit: int = 26) -> str:
    """A label for a figure: one line, not long, and not one that legends would leave out."""
    line = " ".join(visible(text).split())
    if len(line) > limit:
        line = f"{line[: limit // 2 - 1]}…{line[-(limit // 2) :]}"
    return f"\u2009{line}" if line.startswith("_") else line


def tokens_axis(axes: Axes, first: float, last: float) -> None:
    """A logarithmic axis that has room for 0, where nothing was trained yet.

    `first` is the smallest number above 0 on it, `last` the largest.
    """
    if last > 30 * first:
        axes.set_xscale("symlog", linthresh=first, linscale=0.35)
        decades = np.arange(np.floor(np.log10(first)), np.ceil(np.log10(last)) + 1)
        marks = [v for v in 10.0**decades if first * 0.999 < v <= last * 1.001]
        axes.set_xticks([0.0, *(marks if len(marks) > 1 else [first, last])])
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(short))


def size_axis(axes: Axes, sizes: Floats) -> None:
    """An axis of parameters."""
    spread = sizes.max() - sizes.min()
    margin = 0.08 * spread if spread else 0.1 * sizes.max()
    axes.set_xlim(sizes.min() - margin, sizes.max() + margin)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(short))


def legend(figure: Figure, handles: list[Any], labels: list[str]) -> None:
    """Above everything, in as many columns as the labels leave room for."""
    widest = max((len(label) for label in labels), default=1)
    in_one_line = sum(len(label) + 6 for label in labels) <= 66
    columns = len(labels) if in_one_line else max(1, 62 // (widest + 6))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, borderpad=0.2)


def thinned(values: Floats, limit: int = 500) -> NDArray[np.int64]:
    """At most `limit` places spread over the values, first and last among them, (n,) int64."""
    count = min(limit, len(values))
    return np.unique(np.linspace(0, len(values) - 1, count).round().astype(np.int64))
