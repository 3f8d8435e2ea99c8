// The map: which part of it is seen, and what is drawn of it.
"use strict";
function viewing(images, tints, thumbnails) {
  const { N, xy, order } = images, { isLit, css } = tints;
  const map = $("map"), overlay = $("overlay"), MOST_SHOWN = 3000;
  const view = { x: 0.5, y: 0.5, scale: 1, width: 1, height: 1, ratio: 1 }; // points.js says what is what
  const marks = { chosen: -1, linked: [], path: null }; // an image, its neighbours, a lasso in units of the map
  let whole = 1; // scale at which all is seen
  let fitted = true, flight = 0, frame = 0, shown = [], side = 0;
  const X = (row) => (xy[2 * row] - view.x) * view.scale + view.width / 2;
  const Y = (row) => (xy[2 * row + 1] - view.y) * view.scale + view.height / 2;
  const redraw = () => { frame ||= requestAnimationFrame(() => { frame = 0; draw(); }); };

  const extent = [0.05, 0.05]; // width and height of the map in its own units
  xy.forEach((value, i) => { extent[i % 2] = Math.max(extent[i % 2], 2 * Math.abs(value - 0.5)); });
  function fit() { // all, with no point under the legend
    const { width, height } = view, edge = map.getBoundingClientRect(), card = $("legend").getBoundingClientRect();
    const right = card.right - edge.left, top = card.top - edge.top;
    const within = (left, w, h) => {
      const scale = Math.max(80, Math.min((w - 72) / extent[0], (h - 72) / extent[1]));
      return { scale, x: 0.5 - (left + w / 2 - width / 2) / scale, y: 0.5 - (h / 2 - height / 2) / scale };
    };
    const set = (found) => { Object.assign(view, found); whole = found.scale; };
    cancelAnimationFrame(flight);
    set(within(0, width, height));
    const under = (row) => X(row) < right + 6 && Y(row) > top - 6;
    if (card.width && order.some(under)) {
      const [beside, above] = [within(right, width - right, height), within(0, width, top)];
      set(beside.scale >= above.scale ? beside : above);
    }
    fitted = true;
    redraw();
  }
  function moveBy(dx, dy) {
    cancelAnimationFrame(flight);
    view.x = clamp(-0.2, view.x - dx / view.scale, 1.2);
    view.y = clamp(-0.2, view.y - dy / view.scale, 1.2);
    fitted = false;
    redraw();
  }
  function zoom(factor, px = view.width / 2, py = view.height / 2) {
    const scale = clamp(whole / 2, view.scale * factor, whole * Math.max(4, Math.sqrt(N) / 2));
    const dx = px - view.width / 2, dy = py - view.height / 2;
    view.x += dx / view.scale - dx / scale; // what is under the pointer stays there
    view.y += dy / view.scale - dy / scale;
    view.scale = scale;
    moveBy(0, 0);
  }
  function flyTo(row) { // only if it is out of sight
    if (X(row) > 20 && X(row) < view.width - 20 && Y(row) > 20 && Y(row) < view.height - 20) return;
    const from = { ...view }, begin = performance.now();
    const time = matchMedia("(prefers-reduced-motion: reduce)").matches ? 1 : 320;
    const step = (now) => {
      const t = clamp(0, (now - begin) / time, 1), eased = 1 - (1 - t) ** 3;
      view.x = from.x + (xy[2 * row] - from.x) * eased;
      view.y = from.y + (xy[2 * row + 1] - from.y) * eased;
      fitted = false;
      draw();
      if (t < 1) flight = requestAnimationFrame(step);
    };
    cancelAnimationFrame(flight);
    flight = requestAnimationFrame(step);
  }
  function resize() {
    const { clientWidth: width, clientHeight: height } = map, ratio = window.devicePixelRatio || 1;
    if (!width || !height || (width === view.width && height === view.height && ratio === view.ratio)) return;
    // The panel takes its room at the right or below: nothing else moves.
    view.x += (width - view.width) / 2 / view.scale;
    view.y += (height - view.height) / 2 / view.scale;
    Object.assign(view, { width, height, ratio });
    for (const canvas of map.querySelectorAll("canvas")) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    if (fitted && $("panel").hidden) fit();
    draw(); // now: the canvases are empty
  }

  const scene = { xy, colours: tints.colours, order, view };
  const diameter = () => clamp(3, 0.34 * whole / Math.sqrt(N) * (view.scale / whole) ** 0.3, shown.length ? 5.5 : 8);
  // Where a frame takes long (many points, no graphics card), fewer are drawn while the map moves, and all when it rests.
  const FEWEST = 15000, SLOW = 70; // milliseconds of two frames
  let affordable = N, painted = { of: "", at: -Infinity, most: 0 }, tinted = 0, rest = 0;
  function paint() {
    const { x, y, scale, width, height, ratio } = view, size = diameter(), now = performance.now();
    const of = [x, y, scale, width, height, ratio, size, tinted].join();
    const most = of !== painted.of && now - painted.at < 200 ? affordable : N;
    if (of === painted.of && painted.most >= most) return; // no more than thumbnails have come
    painter.paint(size, most);
    painted = { of, at: now, most };
    clearTimeout(rest);
    if (most < N) rest = setTimeout(redraw, 220);
    if (most === affordable && N > FEWEST) requestAnimationFrame(() => requestAnimationFrame(() => {
      const took = performance.now() - now;
      if (took > SLOW && took < 2000) affordable = Math.max(FEWEST, affordable >> 1);
    }));
  }
  let painter = startPainter();
  function startPainter() {
    const found = Points.webgl($("points"), scene);
    if (!found) return replaced();
    $("points").addEventListener("webglcontextlost", () => {
      painter = replaced();
      view.ratio = 0; // whatever it is, the new canvas has another size
      resize();
      tints.theme();
    });
    return found;
  }
  function replaced() { // a canvas that has been asked for WebGL gives no other context
    $("points").replaceWith(make("canvas", { id: "points" }));
    return Points.plain($("points"), scene);
  }

  // At most one thumbnail where one fits; the order is the same at each zoom, so that what is shown stays.
  function choose() {
    const { width, height } = view, spacing = view.scale / Math.sqrt(N);
    shown = [];
    side = clamp(24, spacing * 1.5, 76);
    if (spacing < 14) return;
    const gap = side * 0.92, columns = Math.ceil(width / gap) + 4, lines = Math.ceil(height / gap) + 4;
    const taken = new Int32Array(columns * lines).fill(-1);
    for (let slot = 0; slot < N && shown.length < MOST_SHOWN; slot++) {
      const row = order[slot], x = X(row), y = Y(row);
      if (!isLit(row) || x < -side || y < -side || x > width + side || y > height + side) continue;
      const at = (Math.floor(y / gap) + 2) * columns + Math.floor(x / gap) + 2;
      let free = true;
      for (let dy = -columns; dy <= columns && free; dy += columns) {
        for (let dx = -1; dx <= 1; dx++) {
          const other = taken[at + dy + dx];
          if (other >= 0 && Math.abs(X(other) - x) < gap && Math.abs(Y(other) - y) < gap) { free = false; break; }
        }
      }
      if (free) { taken[at] = row; shown.push(row); }
    }
  }
  function draw() {
    const { width, height, ratio, scale } = view, { chosen, linked, path } = marks;
    thumbnails.forget();
    choose();
    paint();
    const context = overlay.getContext("2d"), style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--ink"), paper = style.getPropertyValue("--paper");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const frameOf = (row, length, line, colour) => {
      const found = thumbnails.ready(row);
      if (!found) return false;
      const [w, h] = thumbnails.box(found, length), x = X(row) - w / 2, y = Y(row) - h / 2;
      context.fillStyle = colour;
      context.fillRect(x - line, y - line, w + 2 * line, h + 2 * line);
      thumbnails.stamp(context, found, x, y, w, h);
      return true;
    };
    const ring = (row, radius, line) => {
      context.beginPath();
      context.arc(X(row), Y(row), radius, 0, 7);
      context.strokeStyle = ink;
      context.lineWidth = line;
      context.stroke();
    };
    for (const row of shown) frameOf(row, side - 4, 1.5, css(row));
    context.strokeStyle = ink;
    context.lineWidth = 1;
    context.beginPath();
    if (chosen >= 0) for (const row of linked) { context.moveTo(X(chosen), Y(chosen)); context.lineTo(X(row), Y(row)); }
    context.stroke();
    for (const row of linked.toReversed()) frameOf(row, Math.max(30, side - 4), 2, ink) || ring(row, 5, 1.5);
    if (chosen >= 0) {
      frameOf(chosen, Math.max(54, side + 10), 4.5, paper);
      frameOf(chosen, Math.max(54, side + 10), 2.5, ink) || ring(chosen, 8, 2.5);
    }
    if (path && path.length > 1) {
      context.beginPath();
      for (const [x, y] of path) context.lineTo((x - view.x) * scale + width / 2, (y - view.y) * scale + height / 2);
      context.closePath();
      context.fillStyle = context.strokeStyle = ink;
      context.lineWidth = 1.5;
      context.stroke();
      context.globalAlpha = 0.06;
      context.fill();
      context.globalAlpha = 1;
    }
    map.dataset.drawn = `${painter.kind} ${shown.length} ${thumbnails.fetch()}`;
    map.dataset.view = `${view.x} ${view.y} ${scale}`;
  }

  function nearest(x, y, within) { // the row of a point; -1: there is none
    let best = -1, distance = within * within;
    for (let row = 0; row < N; row++) {
      const away = (X(row) - x) ** 2 + (Y(row) - y) ** 2;
      if (isLit(row) && away < distance) { best = row; distance = away; }
    }
    return best;
  }
  function hit(x, y, within = 12) { // of a thumbnail, or else of a point
    for (let i = shown.length - 1; i >= 0; i--) {
      const found = thumbnails.ready(shown[i]);
      if (!found) continue;
      const [w, h] = thumbnails.box(found, side);
      if (Math.abs(X(shown[i]) - x) <= w / 2 && Math.abs(Y(shown[i]) - y) <= h / 2) return shown[i];
    }
    return nearest(x, y, within);
  }
  return {
    view, marks, redraw, fit, moveBy, zoom, flyTo, resize, nearest, hit,
    recolour: () => { painter.colours(); tinted++; redraw(); },
    mark: (given) => { Object.assign(marks, { chosen: -1, linked: [], path: null }, given); redraw(); },
    unproject: (x, y) => [(x - view.width / 2) / view.scale + view.x, (y - view.height / 2) / view.scale + view.y],
  };
}
