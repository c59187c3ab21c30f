"use strict";
// Sorts the tables of the page. Lines without a value come last either way; reference lines, in a body of their own, stay on top.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      sort(table.tBodies[table.tBodies.length - 1], column, down ? -1 : 1);
    });
  });
}

function sort(body, column, sign) {
  const lines = [...body.rows].map((line) => ({ line, last: line.classList.contains("failed"), value: valueOf(line.cells[column]) }));
  lines.sort((a, b) => {
    if (a.last !== b.last) return a.last ? 1 : -1;
    if (a.value === null || b.value === null) return (a.value === null) - (b.value === null);
    if (typeof a.value === "number" && typeof b.value === "number") return sign * (a.value - b.value);
    return sign * String(a.value).localeCompare(String(b.value), "en", { numeric: true });
  });
  body.append(...lines.map((entry) => entry.line));
}

// The value behind a cell: a finite number, a text, or null.
function valueOf(cell) {
  const { value, text } = cell.dataset;
  if (text !== undefined) return text;
  return value === undefined || !Number.isFinite(Number(value)) ? null : Number(value);
}
