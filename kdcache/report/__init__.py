"""Run records, sweeps and fidelity reports -> tables, plots, and a page that can be sent to a colleague."""

from kdcache.report.fidelity import FIDELITY_COLUMNS, PARTS_COLUMNS, fidelity_rows, parts_rows, write_fidelity
from kdcache.report.run_page import (
    kl_note,
    loss_plot,
    result_columns,
    result_markdown,
    result_rows,
    smoothed,
    write_pages,
)

__all__ = [
    "FIDELITY_COLUMNS",
    "PARTS_COLUMNS",
    "fidelity_rows",
    "kl_note",
    "loss_plot",
    "parts_rows",
    "result_columns",
    "result_markdown",
    "result_rows",
    "smoothed",
    "write_fidelity",
    "write_pages",
]
