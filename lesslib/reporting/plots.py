"""Pictures and tables under one name: `from lesslib.reporting import plots`.

What is common to many experiments lies in `style`, `charts` and `tables`.
"""

from __future__ import annotations

from lesslib.reporting.charts import bars, by_position, curves, gaps, mean_bars, stacked
from lesslib.reporting.style import BLUES, COLOURS, axes, colour, save
from lesslib.reporting.tables import table, verdict_table

__all__ = [
    "BLUES",
    "COLOURS",
    "axes",
    "bars",
    "by_position",
    "colour",
    "curves",
    "gaps",
    "mean_bars",
    "save",
    "stacked",
    "table",
    "verdict_table",
]
