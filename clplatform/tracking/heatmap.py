"""The accuracy matrix as a picture for loggers that take images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clplatform.metric.score import is_share
from clplatform.tracking.logger import Matrix, RunContext, finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def heat_map(matrix: Matrix, run: RunContext) -> Any:
    """A heat map as an RGB array [height, width, 3] (uint8); cells without a meaning stay grey."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    values = np.array([[v if finite(v) else np.nan for v in row] for row in matrix], dtype=float)
    n_rows, n_columns = values.shape
    size = min(max(0.55 * n_columns + 1.6, 3.5), 12), min(max(0.4 * n_rows + 1.2, 2.5), 10)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)  # no pyplot: nothing global, no window
    axes = figure.subplots()
    axes.set_facecolor("0.92")
    share = is_share(run.metric)
    limits: dict[str, Any] = {"vmin": 0, "vmax": 1} if share else {}
    image = axes.imshow(values, cmap="viridis" if run.higher_is_better else "viridis_r", aspect="auto", **limits)
    figure.colorbar(image)
    if n_columns <= 20:
        _write_cells(axes, values, image, percent=share)
        axes.set_xticks(range(n_columns), [str(j + 1) for j in range(n_columns)])
        axes.set_yticks(range(n_rows))
    axes.set(xlabel="evaluated on experience", ylabel="after experience", title=run.metric)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _write_cells(axes: Axes, values: Any, image: Any, *, percent: bool) -> None:
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value == value:  # not nan
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
                text = f"{100 * value:.0f}" if percent else f"{value:.3g}"
                axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
