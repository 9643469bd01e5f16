// SPDX-License-Identifier: Apache-2.0
// A click on a column header sorts the table by that column, a second click reverses the order. Missing values come last.
for (const table of document.querySelectorAll("table.sortable")) {
  table.tHead.addEventListener("click", (event) => {
    const head = event.target.closest("th");
    if (!head) return;
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const column = head.cellIndex;
    const key = (row) => row.cells[column].dataset.value ?? "";
    const compare = (a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = column === 0 ? x.localeCompare(y) : Number(x) - Number(y);
      return up ? order : -order;
    };
    const body = table.tBodies[0];
    body.append(...Array.from(body.rows).sort(compare));
  });
}
for (const video of document.querySelectorAll("video")) {
  video.addEventListener("click", () => (video.paused ? video.play() : video.pause()));
}
