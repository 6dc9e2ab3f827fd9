"""
Draw pictures that are legible on a light page and on a dark one: no background, and grey text.

    figure, axes = new_picture()
    axes.plot(...)
    save_picture(figure, "out/loss.png")
"""

from pathlib import Path

from lib.files import write_atomically

GREY = "#808080"  # equally far from white and from black
BLUE, ORANGE, PURPLE = "#3b82f6", "#f97316", "#a855f7"


def new_picture(panels=1):
    """Return matplotlib's (figure, axes): 8 x 4.5 inches, or 12 x 4.5 with two axes."""
    import matplotlib.figure  # not pyplot, which keeps every figure, and may want a screen

    grey = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    style = dict.fromkeys(grey, GREY) | {"axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False, "font.size": 11}
    matplotlib.rcParams.update(style)
    figure = matplotlib.figure.Figure((4 + 4 * panels, 4.5), layout="constrained")
    return figure, figure.subplots(1, panels)


def save_picture(figure, path):
    """Write a PNG of 120 pixels per inch, and create its folder if needed. Raises OSError if it cannot be written."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        figure.savefig(file, dpi=120, format="png", transparent=True)
