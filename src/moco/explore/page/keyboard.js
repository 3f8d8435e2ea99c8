// The map and the filter by keyboard.
"use strict";
function typing(tints, view, panel, pointer) {
  const map = $("map"), filter = $("filter");
  const KEYS = {
    ArrowLeft: () => view.moveBy(70, 0), ArrowRight: () => view.moveBy(-70, 0),
    ArrowUp: () => view.moveBy(0, 70), ArrowDown: () => view.moveBy(0, -70),
    "+": () => view.zoom(1.4), "=": () => view.zoom(1.4), "-": () => view.zoom(1 / 1.4), 0: view.fit,
    Enter: () => {
      const row = view.nearest(view.view.width / 2, view.view.height / 2, Infinity);
      if (row >= 0) panel.openImage(row, true);
    },
  };
  map.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && event.target !== filter && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      filter.focus();
    } else if (event.key === "Escape" && !pointer.stop()) { // the last thing first
      if (panel.isOpen()) panel.close();
      else { filter.value = ""; tints.clear(); map.focus(); }
    }
  });
  function list() {
    const rows = tints.matching();
    if (rows.length) panel.openList(rows);
  }
  filter.addEventListener("input", () => tints.filter(filter.value));
  filter.addEventListener("keydown", (event) => { if (event.key === "Enter") list(); });
  $("matches").onclick = list;
}
