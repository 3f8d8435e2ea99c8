"""Colours of pictures, on light and dark backgrounds."""

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moco.figures.letters import plain

CLASS_COLOURS_LIGHT = (
    "#0072B2",
    "#F0A000",
    "#009E73",
    "#D55E00",
    "#7CC8F0",
    "#C878AA",
    "#781E00",
    "#1F1F96",
    "#320032",
    "#AF7DFA",
)
"""Colours of classes; the first six are near those of Okabe and Ito (jfly.uni-koeln.de/color). Any two differ by at
least 0.07 in OKLab, also as seen by people who lack red, green or blue cones (Machado et al. 2009)."""
CLASS_COLOURS_DARK = (
    "#4AA8E0",
    "#F2B233",
    "#64E1AF",
    "#C87D32",
    "#AFFAFA",
    "#C81964",
    "#FAFA00",
    "#327DAF",
    "#006400",
    "#9600FA",
)
"""Colours of classes on a dark background."""


@dataclass(frozen=True)
class Theme:
    """Colours of a picture; classes beyond those in `classes` are grey."""

    paper: str
    ink: str
    muted: str
    classes: tuple[str, ...]

    @property
    def blue(self) -> str:
        return self.classes[0]

    @property
    def green(self) -> str:
        return self.classes[2]

    @property
    def orange(self) -> str:
        return self.classes[3]

    def of_class(self, number: int) -> str:
        return self.classes[number] if 0 <= number < len(self.classes) else self.muted

    def variables(self) -> dict[str, str]:
        """Return the colours by the names of their CSS custom properties."""
        named = {"paper": self.paper, "ink": self.ink, "muted": self.muted}
        named |= {f"class-{number}": colour for number, colour in enumerate(self.classes)}
        return {f"--figure-{name}": colour for name, colour in named.items()}


LIGHT = Theme(paper="#FFFFFF", ink="#1B1F24", muted="#6E7681", classes=CLASS_COLOURS_LIGHT)
DARK = Theme(paper="#14171B", ink="#E9ECEF", muted="#9AA3AC", classes=CLASS_COLOURS_DARK)


def colours(theme: Theme) -> str:
    """Return the colours of a theme as CSS declarations."""
    return " ".join(f"{name}: {colour};" for name, colour in theme.variables().items())


def dress(axes: Axes, theme: Theme, *, title: str = "", x: str = "", y: str = "") -> None:
    """Style axes: in the theme's colours, without a box, with the title on the left."""
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(theme.muted)
    axes.tick_params(colors=theme.ink, which="both")
    axes.tick_params(color=theme.muted, which="both")
    axes.set_title(plain(title), loc="left", color=theme.ink, fontsize=11, parse_math=False)
    axes.set_xlabel(x, color=theme.ink)
    axes.set_ylabel(y, color=theme.ink)


def legend(axes: Axes, theme: Theme) -> None:
    """Add a legend without a frame, if any line has a label."""
    if not axes.get_legend_handles_labels()[0]:
        return
    box = axes.legend(frameon=False, fontsize="small", labelcolor=theme.ink)
    for text in box.get_texts():
        text.set_parse_math(False)


def blank(width: float, height: float, theme: Theme, *, arranged: bool = True) -> Figure:
    """Return an empty figure, with sizes in inches; `arranged`: its axes are laid out automatically."""
    layout = "constrained" if arranged else None
    return Figure(figsize=(width, height), layout=layout, dpi=120, facecolor=theme.paper)
