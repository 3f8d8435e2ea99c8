// The map by mouse, pen and finger: drag, pinch, wheel, click, and the lasso.
"use strict";
function pointing(images, tints, thumbnails, view, panel) {
  const { N, xy, base, classOf } = images, { marks } = view, map = $("map"), tip = $("tip");
  const pointers = new Map(); // those that are down, by id, and where
  let lassoing = false, moved = false, start = null, hovered = -1;
  function at(event) {
    const edge = map.getBoundingClientRect();
    return [event.clientX - edge.left, event.clientY - edge.top];
  }
  function setLasso(on) {
    lassoing = on;
    $("lasso").setAttribute("aria-pressed", on);
    map.classList.toggle("lasso", on);
  }
  function inside(polygon, x, y) {
    let odd = false;
    for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
      const [ax, ay] = polygon[i], [bx, by] = polygon[j];
      if ((ay > y) !== (by > y) && x < (bx - ax) * (y - ay) / (by - ay) + ax) odd = !odd;
    }
    return odd;
  }
  function hover(x, y) {
    const row = view.hit(x, y), { width, height } = view.view;
    map.classList.toggle("over", row >= 0);
    tip.hidden = row < 0;
    if (row < 0) { hovered = -1; return; }
    if (row !== hovered) {
      hovered = row;
      tip.lastElementChild.textContent = [classOf(row), base(row)].filter(Boolean).join(" \u00b7 ");
      const canvas = tip.firstElementChild;
      thumbnails.paint(make("canvas"), row, 120).then(() => hovered === row && thumbnails.paint(canvas, row, 120));
    }
    tip.style.transform = `translate(${x > width - 200 ? x - 190 : x + 16}px, ${y > height - 180 ? y - 160 : y + 16}px)`;
  }
  map.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    map.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, at(event));
    tip.hidden = true;
    moved = pointers.size > 1;
    start = at(event);
    if (pointers.size > 1) marks.path = null;
    else if (lassoing || event.shiftKey) { panel.close(); marks.path = [view.unproject(...start)]; }
  });
  map.addEventListener("pointermove", (event) => {
    const [x, y] = at(event), before = pointers.get(event.pointerId);
    if (!before) { if (event.pointerType === "mouse") hover(x, y); return; }
    if (pointers.size === 2) {
      const [a, b] = [...pointers.values()], apart = Math.hypot(a[0] - b[0], a[1] - b[1]);
      pointers.set(event.pointerId, [x, y]);
      const [c, d] = [...pointers.values()];
      view.moveBy((x - before[0]) / 2, (y - before[1]) / 2);
      view.zoom(Math.hypot(c[0] - d[0], c[1] - d[1]) / Math.max(1, apart), (c[0] + d[0]) / 2, (c[1] + d[1]) / 2);
      return;
    }
    moved ||= Math.hypot(x - start[0], y - start[1]) > 4;
    pointers.set(event.pointerId, [x, y]);
    if (!moved) return;
    if (marks.path) {
      marks.path.push(view.unproject(x, y));
      view.redraw();
    } else {
      map.classList.add("moving");
      view.moveBy(x - before[0], y - before[1]);
    }
  });
  function lift(event) {
    if (!pointers.delete(event.pointerId) || pointers.size) return;
    map.classList.remove("moving");
    const { path } = marks;
    if (path && event.type === "pointerup") {
      const rows = [];
      for (let row = 0; row < N; row++) {
        if (tints.isActive(row) && inside(path, xy[2 * row], xy[2 * row + 1])) rows.push(row);
      }
      setLasso(false);
      if (moved && rows.length) panel.openList(rows, path);
      else { marks.path = null; announce("No image selected"); view.redraw(); }
    } else if (!moved && event.type === "pointerup") {
      const row = view.hit(...at(event), event.pointerType === "touch" ? 24 : 12);
      if (row >= 0) panel.openImage(row); else panel.close();
    }
  }
  map.addEventListener("pointerup", lift);
  map.addEventListener("pointercancel", lift);
  map.addEventListener("pointerleave", () => { tip.hidden = true; hovered = -1; });
  map.addEventListener("wheel", (event) => {
    event.preventDefault();
    tip.hidden = true;
    const speed = event.deltaMode ? 0.05 : event.ctrlKey ? 0.01 : 0.0018; // a trackpad's pinch comes as Ctrl and wheel
    view.zoom(Math.exp(-clamp(-300, event.deltaY, 300) * speed), ...at(event));
  }, { passive: false });
  $("lasso").onclick = () => setLasso(!lassoing);
  return {
    stop() { // what has begun; false: nothing had
      if (!lassoing && !pointers.size) return false;
      marks.path = null;
      moved = true;
      setLasso(false);
      view.redraw();
      return true;
    },
  };
}
