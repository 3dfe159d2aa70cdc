"use strict";
// Sorting and filtering for the table of every check; the page is complete without it.
(() => {
  const table = document.querySelector("#every table");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const text = rows.map((row) => row.textContent.toLowerCase());
  const value = (row, column) => {
    const cell = row.cells[column].textContent.trim();
    const number = cell === "inf" ? Infinity : cell === "nan" ? Number.MAX_VALUE : Number(cell.replaceAll(",", ""));
    return Number.isNaN(number) || cell === "" ? cell : number;
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const order = rows.map((row) => [value(row, column), row]).sort((a, b) => compare(a[0], b[0]));
      if (down) order.reverse();
      body.append(...order.map((pair) => pair[1]));
    });
  });
  const controls = document.querySelector("#every .controls");
  const [search, failed] = controls.querySelectorAll("input");
  const shown = controls.querySelector("output");
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    rows.forEach((row, index) => {
      const keep = words.every((word) => text[index].includes(word)) && (!failed.checked || row.dataset.failed === "");
      row.hidden = !keep;
      count += keep;
    });
    shown.textContent = `${count} of ${rows.length} shown`;
  };
  search.addEventListener("input", filter);
  failed.addEventListener("change", filter);
  controls.hidden = false;
  filter();
})();
