"use strict";
// A press on a heading sorts its table by that column, a second press the other way round.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th"), table = heading.closest("table"), body = table.tBodies[0];
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => row.cells[heading.cellIndex].dataset.value;
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      return x === undefined
        ? a.cells[0].textContent.localeCompare(b.cells[0].textContent) : Number(x) - Number(y);
    });
    body.append(...(down ? rows.reverse() : rows));
  });
}
