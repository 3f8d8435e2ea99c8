// The map of images: what is here is what runs. The data come from the server, or stand in the page itself.
// Names of files and classes reach the document as text only, never as markup.
"use strict";
(async () => {
  const $ = (id) => document.getElementById(id);
  const make = (tag, given = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), given);
    element.append(...children.filter((child) => child !== null && child !== ""));
    return element;
  };
  const clamp = (low, value, high) => Math.min(high, Math.max(low, value));
  const count = (number, noun = "image") => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
  const announce = (text) => { $("status").textContent = text; };

  // ---------------------------------------------------------------- data
  const ARRAYS = { Uint8Array, Uint16Array, Uint32Array, Int32Array, Float32Array };
  const unpack = ([type, text]) => new ARRAYS[type](Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  async function ask(path, options) {
    let answer;
    try {
      answer = await fetch(path, options);
    } catch {
      throw new Error("The program behind this page has ended.");
    }
    if (!answer.ok) throw new Error(await answer.text());
    return answer.json();
  }
  const saved = $("data") !== null;
  let data;
  try {
    data = saved ? JSON.parse($("data").textContent) : await ask("data.json");
  } catch (error) {
    $("about").textContent = error.message;
    return;
  }
  const { names, classes, root } = data;
  const N = names.length;
  const xy = Float32Array.from(unpack(data.xy), (value) => value / 65535); // x and y in turn
  const labels = data.labels && unpack(data.labels);
  const clusters = unpack(data.clusters);
  const outlier = unpack(data.outlier);
  const order = unpack(data.order); // rows, as their thumbnails come forward
  const slots = new Uint32Array(N);
  order.forEach((row, slot) => { slots[row] = slot; });
  const near = data.near && { rows: unpack(data.near.rows), similarity: unpack(data.near.similarity) };
  const ranked = Float32Array.from(outlier).sort();
  const strange = { low: ranked[Math.floor(0.02 * (N - 1))], high: ranked[Math.ceil(0.98 * (N - 1))] };

  const base = (row) => names[row].slice(names[row].search(/[^/\\]*$/));
  const folder = (row) => names[row].slice(0, names[row].search(/[^/\\]*$/));
  const classOf = (row) => (labels && labels[row] >= 0 ? classes[labels[row]] : "");
  const percent = (row) => { // of the images that are less strange
    let low = 0, high = N;
    while (low < high) { const middle = (low + high) >> 1; ranked[middle] < outlier[row] ? low = middle + 1 : high = middle; }
    return Math.round(100 * low / N);
  };
  const similar = (value) => value.toFixed(2).replace("-", "\u2212");
  async function neighbours(row) {
    if (!near) return ask(`neighbours/${row}`);
    const rows = [], similarity = [], k = near.rows.length / N;
    for (let i = row * k; i < (row + 1) * k; i++) { rows.push(near.rows[i]); similarity.push(near.similarity[i] / 10000 - 1); }
    return { rows, similarity };
  }

  // ---------------------------------------------------------------- colours
  // Okabe and Ito's, told apart with any colour vision (their yellow darker, for a light ground), and three more;
  // beyond them, hues a golden angle apart.
  const NAMED = ["0072b2", "e69f00", "009e73", "d55e00", "56b4e9", "cc79a7", "b8a800", "5a4fcf", "96285f", "8c6239"];
  const rgb = (hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const fromHsl = (hue, saturation, light) => [0, 8, 4].map((n) => {
    const k = (n + hue / 30) % 12;
    return Math.round(255 * (light - saturation * Math.min(light, 1 - light) * clamp(-1, Math.min(k - 3, 9 - k), 1)));
  });
  const palette = (group) => group < 0 ? [140, 144, 150] : group < NAMED.length ? rgb(NAMED[group])
    : fromHsl((group * 137.5) % 360, 0.5, [0.38, 0.55, 0.7][group % 3]);
  const isDark = () => (document.documentElement.dataset.theme
    || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const ramp = () => (isDark() ? ["3d434b", "a85a1c", "f5a742", "fff0c2"] : ["cfd3d8", "efb04a", "d55e00", "6d1a00"]).map(rgb);
  function unusual(value, stops) {
    const at = clamp(0, (value - strange.low) / (strange.high - strange.low || 1), 1) * (stops.length - 1);
    const i = Math.min(stops.length - 2, Math.floor(at));
    return stops[i].map((from, c) => Math.round(from + (stops[i + 1][c] - from) * (at - i)));
  }

  const MODES = { label: "Class", cluster: "Cluster", outlier: "Outliers" };
  let mode = labels ? "label" : "cluster";
  let kept = new Set(); // groups pressed in the legend; none: all
  let words = "";
  let selected = null; // rows of the list that is open
  const active = new Uint8Array(N).fill(1); // rows that the filter and the legend let through
  const colours = new Uint8Array(4 * N);
  const groupOf = (row) => (mode === "label" ? labels[row] : mode === "cluster" ? clusters[row] : -1);
  const groupName = (group) => (mode === "cluster" ? `Cluster ${group + 1}` : group < 0 ? "No class" : classes[group]);
  const css = (row) => `rgb(${colours.slice(4 * row, 4 * row + 3).join()})`;
  function dot(colour) {
    const spot = make("i", { className: "dot" });
    spot.style.background = colour;
    return spot;
  }

  const isLit = (row) => active[row] && (!selected || selected.has(row));
  function recolour() {
    const known = new Map(), stops = ramp();
    for (let row = 0; row < N; row++) {
      const group = groupOf(row);
      if (!known.has(group)) known.set(group, palette(group));
      colours.set(mode === "outlier" ? unusual(outlier[row], stops) : known.get(group), 4 * row);
      colours[4 * row + 3] = isLit(row) ? 225 : 34;
    }
    painter.colours();
    redraw();
  }
  function refilter() {
    let matching = 0;
    for (let row = 0; row < N; row++) {
      const text = !words || names[row].toLowerCase().includes(words) || classOf(row).toLowerCase().includes(words);
      active[row] = text && (!kept.size || kept.has(groupOf(row))) ? 1 : 0;
      matching += active[row];
    }
    const some = words !== "" || kept.size > 0;
    $("matches").hidden = !some;
    $("matches").textContent = `List ${matching.toLocaleString("en")}`;
    $("matches").disabled = matching === 0;
    if (some) announce(`${count(matching)} shown`);
    recolour();
  }
  function legend() {
    for (const button of $("modes").children) button.setAttribute("aria-pressed", button.value === mode);
    const sizes = new Map();
    if (mode !== "outlier") for (let row = 0; row < N; row++) sizes.set(groupOf(row), (sizes.get(groupOf(row)) || 0) + 1);
    const groups = [...sizes.keys()].sort((a, b) => a - b), MOST = 200;
    $("entries").replaceChildren(...groups.slice(0, MOST).map((group) => {
      const button = make("button", { title: groupName(group), onclick: () => {
        kept.has(group) ? kept.delete(group) : kept.add(group);
        button.setAttribute("aria-pressed", kept.has(group));
        $("entries").classList.toggle("some", kept.size > 0);
        refilter();
      } }, dot(`rgb(${palette(group)})`), make("span", { textContent: groupName(group) }),
      make("b", { textContent: sizes.get(group).toLocaleString("en") }));
      button.setAttribute("aria-pressed", "false");
      return make("li", {}, button);
    }));
    if (groups.length > MOST) $("entries").append(make("p", { textContent: `and ${groups.length - MOST} more` }));
    $("entries").classList.remove("some");
    $("scale").hidden = mode !== "outlier";
    $("scale").querySelector("i").style.background = `linear-gradient(90deg, ${ramp().map((stop) => `rgb(${stop})`)})`;
  }
  function setMode(name) {
    mode = name;
    kept = new Set();
    legend();
    refilter();
  }

  // ---------------------------------------------------------------- view
  const map = $("map"), overlay = $("overlay");
  const view = { x: 0.5, y: 0.5, scale: 1, width: 1, height: 1, ratio: 1 }; // points.js says what is what
  let width = 1, height = 1, ratio = 1, fitted = true, flight = 0, frame = 0;
  const X = (row) => (xy[2 * row] - view.x) * view.scale + width / 2;
  const Y = (row) => (xy[2 * row + 1] - view.y) * view.scale + height / 2;
  const extent = [0.05, 0.05]; // width and height of the map in its own units
  xy.forEach((value, i) => { extent[i % 2] = Math.max(extent[i % 2], 2 * Math.abs(value - 0.5)); });
  const whole = () => Math.max(80, Math.min((width - 72) / extent[0], (height - 72) / extent[1]));
  const redraw = () => { frame ||= requestAnimationFrame(() => { frame = 0; draw(); }); };
  function fit() {
    cancelAnimationFrame(flight);
    Object.assign(view, { x: 0.5, y: 0.5, scale: whole() });
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
  function zoom(factor, px = width / 2, py = height / 2) {
    const scale = clamp(whole() / 2, view.scale * factor, whole() * Math.max(4, Math.sqrt(N) / 2));
    const dx = px - width / 2, dy = py - height / 2;
    view.x += dx / view.scale - dx / scale; // what is under the pointer stays there
    view.y += dy / view.scale - dy / scale;
    view.scale = scale;
    moveBy(0, 0);
  }
  function flyTo(row) { // only if it is out of sight
    if (X(row) > 40 && X(row) < width - 40 && Y(row) > 40 && Y(row) < height - 40) return;
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
    ({ clientWidth: width, clientHeight: height } = map);
    if (!width || !height) return;
    ratio = window.devicePixelRatio || 1;
    Object.assign(view, { width, height, ratio });
    for (const canvas of map.querySelectorAll("canvas")) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    fitted ? fit() : redraw();
  }

  // ---------------------------------------------------------------- points
  const scene = { xy, colours, order, view };
  function startPainter() {
    const found = Points.webgl($("points"), scene);
    if (!found) return replaced();
    $("points").addEventListener("webglcontextlost", () => { painter = replaced(); resize(); recolour(); });
    return found;
  }
  function replaced() { // a canvas that has been asked for WebGL gives no other context
    $("points").replaceWith(make("canvas", { id: "points" }));
    return Points.plain($("points"), scene);
  }
  let painter = startPainter();

  // ---------------------------------------------------------------- thumbnails
  const { cell, across } = data, PER_SHEET = across * across, MOST_SHEETS = 96, MOST_SHOWN = 3000;
  const sheets = new Map(); // number -> { image, sizes }, the least recently used first
  const loading = new Map();
  let wanted = new Set(), shown = [], side = 0;
  function load(number) {
    if (sheets.has(number)) return Promise.resolve(sheets.get(number));
    if (!loading.has(number)) {
      loading.set(number, (async () => {
        let sheet = { sizes: [], image: null };
        try {
          const { sizes, image: source } = saved ? data.sheets[number] : await ask(`sheet/${number}`);
          const image = new Image();
          image.src = source;
          await image.decode();
          sheet = { sizes, image };
        } catch (error) {
          $("note").textContent = error.message;
        }
        sheets.set(number, sheet);
        if (sheets.size > MOST_SHEETS) sheets.delete(sheets.keys().next().value);
        loading.delete(number);
        redraw();
        return sheet;
      })());
    }
    return loading.get(number);
  }
  function thumbnail(row, sheet) { // arguments of drawImage: the sheet, and where on it
    const place = slots[row] % PER_SHEET, size = sheet.sizes[place];
    if (!sheet.image || !size || !size[0]) return null;
    return [sheet.image, place % across * cell, Math.floor(place / across) * cell, ...size];
  }
  function ready(row) {
    const number = Math.floor(slots[row] / PER_SHEET), sheet = sheets.get(number);
    if (!sheet) { wanted.add(number); return null; }
    if (sheets.size > MOST_SHEETS / 2) { sheets.delete(number); sheets.set(number, sheet); }
    return thumbnail(row, sheet);
  }
  async function paintThumbnail(canvas, row, pixels) {
    const found = thumbnail(row, await load(Math.floor(slots[row] / PER_SHEET)));
    const [w, h] = found ? found.slice(3) : [1, 1];
    const grown = pixels / Math.max(w, h);
    Object.assign(canvas, { width: Math.round(w * grown), height: Math.round(h * grown) });
    if (found) stamp(canvas.getContext("2d"), found, 0, 0, canvas.width, canvas.height);
    return found !== null;
  }
  function stamp(context, found, x, y, w, h) {
    context.imageSmoothingQuality = "high";
    context.drawImage(...found, x, y, w, h);
  }
  // At most one thumbnail where one fits; the order is the same at each zoom, so that what is shown stays.
  function choose() {
    const spacing = view.scale / Math.sqrt(N);
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
  const box = (found, length) => { // width and height at which a thumbnail is drawn
    const grown = length / Math.max(found[3], found[4]);
    return [found[3] * grown, found[4] * grown];
  };

  // ---------------------------------------------------------------- drawing
  let chosen = -1, linked = [], path = null, hovered = -1; // path: the lasso, in units of the map
  function pick({ row = -1, rows = null, outline = null }) {
    chosen = row, linked = [], path = outline;
    const before = selected;
    selected = rows && new Set(rows);
    if (before || selected) recolour(); else redraw();
  }
  const diameter = () => clamp(3, 0.34 * whole() / Math.sqrt(N) * (view.scale / whole()) ** 0.3, shown.length ? 5.5 : 8);
  function draw() {
    wanted = new Set();
    choose();
    painter.paint(diameter());
    const context = overlay.getContext("2d"), style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--ink"), paper = style.getPropertyValue("--paper");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const frameOf = (row, length, line, colour) => {
      const found = ready(row);
      if (!found) return false;
      const [w, h] = box(found, length), x = X(row) - w / 2, y = Y(row) - h / 2;
      context.fillStyle = colour;
      context.fillRect(x - line, y - line, w + 2 * line, h + 2 * line);
      stamp(context, found, x, y, w, h);
      return true;
    };
    for (const row of shown) frameOf(row, side - 4, 1.5, css(row));
    const ring = (row, radius, line) => {
      context.beginPath();
      context.arc(X(row), Y(row), radius, 0, 7);
      context.strokeStyle = ink;
      context.lineWidth = line;
      context.stroke();
    };
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
      for (const [x, y] of path) context.lineTo((x - view.x) * view.scale + width / 2, (y - view.y) * view.scale + height / 2);
      context.closePath();
      context.fillStyle = context.strokeStyle = ink;
      context.lineWidth = 1.5;
      context.stroke();
      context.globalAlpha = 0.06;
      context.fill();
      context.globalAlpha = 1;
    }
    for (const number of wanted) { // two at a time: what is wanted may be other by then
      if (loading.size >= 2) break;
      load(number);
    }
    map.dataset.drawn = `${painter.kind} ${shown.length} ${wanted.size}`;
  }

  // ---------------------------------------------------------------- panel
  const details = $("details"), panel = $("panel");
  let opener = null; // what had the focus before
  function open(title, ...children) {
    if (panel.hidden) opener = document.activeElement;
    panel.hidden = false;
    panel.scrollTop = 0;
    details.replaceChildren(title, ...children);
  }
  function close() {
    if (panel.hidden) return;
    const inside = panel.contains(document.activeElement);
    panel.hidden = true;
    pick({});
    if (inside) (opener && opener.isConnected ? opener : map).focus();
  }
  function tile(row, text) {
    const canvas = make("canvas", { width: 96, height: 96 });
    const button = make("button", { className: "tile", title: names[row], onclick: () => { flyTo(row); openImage(row, true); } },
      canvas, make("span", {}, dot(css(row)), make("em", { textContent: text })));
    button.dataset.row = row;
    button.setAttribute("aria-label", [base(row), classOf(row), text].filter(Boolean).join(", "));
    paintThumbnail(canvas, row, 96);
    return button;
  }
  const tiles = (rows, similarity) => make("div", { className: "tiles" },
    ...rows.map((row, i) => tile(row, similarity ? similar(similarity[i]) : classOf(row))));
  const fact = (name, ...value) => [make("dt", { textContent: name }), make("dd", {}, ...value)];

  async function openImage(row, focus = false) {
    pick({ row });
    const frameOfIt = make("div", { className: "picture" }), title = make("h2", { textContent: base(row), tabIndex: -1 });
    title.append(make("small", { textContent: folder(row) }));
    const unreadable = () => frameOfIt.replaceChildren(make("p", { textContent: "This image cannot be read." }));
    if (saved) {
      const canvas = make("canvas");
      paintThumbnail(canvas, row, 300).then((there) => there || unreadable());
      frameOfIt.append(canvas);
    } else {
      const image = make("img", { alt: base(row), src: `image/${row}`, onerror: unreadable });
      image.onload = () => image.classList.toggle("crisp", image.naturalWidth <= 128);
      frameOfIt.append(image);
    }
    const facts = make("dl", {},
      ...(classOf(row) ? fact("Class", dot(`rgb(${palette(labels[row])})`), classOf(row)) : []),
      ...fact("Cluster", dot(`rgb(${palette(clusters[row])})`), String(clusters[row] + 1)),
      ...fact("Outlier score", `${outlier[row].toFixed(3)}, above ${percent(row)} % of the images`));
    const list = make("section", {}, make("h3", { textContent: "Most similar" }));
    open(title, frameOfIt, facts, list);
    if (focus) title.focus();
    announce([base(row), classOf(row)].filter(Boolean).join(", "));
    try {
      const found = await neighbours(row);
      if (chosen !== row) return;
      linked = found.rows;
      list.append(tiles(found.rows, found.similarity));
    } catch (error) {
      list.append(make("p", { textContent: error.message }));
    }
    redraw();
  }
  function openList(rows) {
    pick({ rows, outline: path });
    const sizes = new Map(), MOST = 240;
    for (const row of rows) sizes.set(groupOf(row), [...(sizes.get(groupOf(row)) || []), row]);
    const groups = mode === "outlier" ? [] : [...sizes].sort((a, b) => b[1].length - a[1].length);
    const bars = make("div", { className: "bars" }, ...groups.slice(0, 8).map(([group, members]) => {
      const bar = make("i");
      bar.style.background = css(members[0]);
      bar.style.width = `${Math.max(3, 100 * members.length / groups[0][1].length)}%`;
      return make("div", {}, make("span", { textContent: groupName(group) }), bar, make("b", { textContent: members.length }));
    }));
    open(make("h2", { textContent: `${count(rows.length)} selected` }),
      make("div", { className: "row" },
        make("button", { id: "save", className: "main", textContent: "Save list", onclick: () => saveList(rows) }),
        make("button", { textContent: "Clear", onclick: close })),
      bars, tiles(rows.slice(0, MOST)),
      rows.length > MOST ? make("small", { textContent: `The first ${MOST} are shown; the list holds all.` }) : "");
    announce(`${count(rows.length)} selected`);
  }
  function saveList(rows) {
    const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    const lines = rows.map((row) => [root + names[row], ...(classes ? [classOf(row)] : [])].map(quoted).join());
    const text = [classes ? "path,class" : "path", ...lines, ""].join("\n");
    const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: "text/csv" })), download: "selection.csv" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
  async function searchBy(file) {
    pick({});
    const image = make("img", { alt: file.name, src: URL.createObjectURL(file) });
    const list = make("section", {}, make("h3", { textContent: "Most similar" }));
    open(make("h2", { textContent: file.name }), make("div", { className: "picture" }, image), list);
    image.onload = image.onerror = () => URL.revokeObjectURL(image.src);
    try {
      const found = await ask("search", { method: "POST", body: file });
      linked = found.rows;
      list.append(tiles(found.rows, found.similarity));
      announce(`${count(found.rows.length)} found`);
    } catch (error) {
      list.replaceChildren(make("p", { textContent: error.message }));
      announce(error.message);
    }
    redraw();
  }

  // ---------------------------------------------------------------- pointer
  let lassoing = false, moved = false, start = null;
  const pointers = new Map();
  function at(event) {
    const edge = map.getBoundingClientRect();
    return [event.clientX - edge.left, event.clientY - edge.top];
  }
  const unproject = (x, y) => [(x - width / 2) / view.scale + view.x, (y - height / 2) / view.scale + view.y];
  function setLasso(on) {
    lassoing = on;
    $("lasso").setAttribute("aria-pressed", on);
    map.classList.toggle("lasso", on);
  }
  function hit(x, y, within = 12) {
    for (let i = shown.length - 1; i >= 0; i--) {
      const found = ready(shown[i]);
      if (!found) continue;
      const [w, h] = box(found, side);
      if (Math.abs(X(shown[i]) - x) <= w / 2 && Math.abs(Y(shown[i]) - y) <= h / 2) return shown[i];
    }
    return nearest(x, y, within);
  }
  function nearest(x, y, within) {
    let best = -1, distance = within * within;
    for (let row = 0; row < N; row++) {
      const away = (X(row) - x) ** 2 + (Y(row) - y) ** 2;
      if (isLit(row) && away < distance) { best = row; distance = away; }
    }
    return best;
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
    const row = hit(x, y), tip = $("tip");
    map.classList.toggle("over", row >= 0);
    tip.hidden = row < 0;
    if (row < 0) { hovered = -1; return; }
    if (row !== hovered) {
      hovered = row;
      tip.lastElementChild.textContent = [classOf(row), base(row)].filter(Boolean).join(" \u00b7 ");
      const canvas = tip.firstElementChild;
      paintThumbnail(make("canvas"), row, 120).then(() => hovered === row && paintThumbnail(canvas, row, 120));
    }
    tip.style.transform = `translate(${x > width - 200 ? x - 190 : x + 16}px, ${y > height - 180 ? y - 160 : y + 16}px)`;
  }
  map.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    map.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, at(event));
    $("tip").hidden = true;
    moved = pointers.size > 1;
    start = at(event);
    if (pointers.size > 1) path = null;
    else if (lassoing || event.shiftKey) { close(); path = [unproject(...start)]; }
  });
  map.addEventListener("pointermove", (event) => {
    const [x, y] = at(event), before = pointers.get(event.pointerId);
    if (!before) { if (event.pointerType === "mouse") hover(x, y); return; }
    if (pointers.size === 2) {
      const [a, b] = [...pointers.values()], apart = Math.hypot(a[0] - b[0], a[1] - b[1]);
      pointers.set(event.pointerId, [x, y]);
      const [c, d] = [...pointers.values()];
      moveBy((x - before[0]) / 2, (y - before[1]) / 2);
      zoom(Math.hypot(c[0] - d[0], c[1] - d[1]) / Math.max(1, apart), (c[0] + d[0]) / 2, (c[1] + d[1]) / 2);
      return;
    }
    moved ||= Math.hypot(x - start[0], y - start[1]) > 4;
    pointers.set(event.pointerId, [x, y]);
    if (!moved) return;
    if (path) {
      path.push(unproject(x, y));
      redraw();
    } else {
      map.classList.add("moving");
      moveBy(x - before[0], y - before[1]);
    }
  });
  function lift(event) {
    if (!pointers.delete(event.pointerId) || pointers.size) return;
    map.classList.remove("moving");
    if (path && event.type === "pointerup") {
      const rows = [];
      for (let row = 0; row < N; row++) if (active[row] && inside(path, xy[2 * row], xy[2 * row + 1])) rows.push(row);
      setLasso(false);
      if (moved && rows.length) openList(rows); else { path = null; announce("No image selected"); redraw(); }
    } else if (!moved && event.type === "pointerup") {
      const row = hit(...at(event), event.pointerType === "touch" ? 24 : 12);
      if (row >= 0) openImage(row); else close();
    }
  }
  map.addEventListener("pointerup", lift);
  map.addEventListener("pointercancel", lift);
  map.addEventListener("pointerleave", () => { $("tip").hidden = true; hovered = -1; });
  map.addEventListener("wheel", (event) => {
    event.preventDefault();
    $("tip").hidden = true;
    const speed = event.deltaMode ? 0.05 : event.ctrlKey ? 0.01 : 0.0018; // a trackpad's pinch comes as Ctrl and wheel
    zoom(Math.exp(-clamp(-300, event.deltaY, 300) * speed), ...at(event));
  }, { passive: false });

  // ---------------------------------------------------------------- keyboard and buttons
  const KEYS = {
    ArrowLeft: () => moveBy(70, 0), ArrowRight: () => moveBy(-70, 0),
    ArrowUp: () => moveBy(0, 70), ArrowDown: () => moveBy(0, -70),
    "+": () => zoom(1.4), "=": () => zoom(1.4), "-": () => zoom(1 / 1.4), 0: fit,
    Enter: () => { const row = nearest(width / 2, height / 2, Infinity); if (row >= 0) openImage(row, true); },
  };
  map.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  const matching = () => openList([...active.keys()].filter((row) => active[row]));
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && event.target !== $("filter") && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      $("filter").focus();
    } else if (event.key === "Escape") { // the last thing first
      if (lassoing || pointers.size) { path = null; moved = true; setLasso(false); redraw(); }
      else if (!panel.hidden) close();
      else { $("filter").value = words = ""; setMode(mode); map.focus(); }
    }
  });
  $("filter").addEventListener("input", () => { words = $("filter").value.trim().toLowerCase(); refilter(); });
  $("filter").addEventListener("keydown", (event) => { if (event.key === "Enter" && active.includes(1)) matching(); });
  $("matches").onclick = matching;
  $("lasso").onclick = () => setLasso(!lassoing);
  $("close").onclick = close;
  $("in").onclick = () => zoom(1.5);
  $("out").onclick = () => zoom(1 / 1.5);
  $("fit").onclick = fit;
  $("theme").onclick = () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    legend();
    recolour();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { legend(); recolour(); });
  if (data.search) {
    $("upload").hidden = false;
    $("upload").onclick = () => $("file").click();
    $("file").onchange = () => { if ($("file").files[0]) searchBy($("file").files[0]); $("file").value = ""; };
    addEventListener("dragover", (event) => event.preventDefault());
    addEventListener("drop", (event) => {
      event.preventDefault();
      if (event.dataTransfer.files[0]) searchBy(event.dataTransfer.files[0]);
    });
  }
  document.title = `${data.title}: map of images`;
  $("title").textContent = data.title;
  $("about").textContent = data.about;
  $("note").textContent = data.note;
  for (const [name, text] of Object.entries(MODES)) {
    if (name === "label" && !labels) continue;
    $("modes").append(make("button", { value: name, textContent: text, onclick: () => setMode(name) }));
  }
  setMode(mode);
  new ResizeObserver(resize).observe(map);
  resize();
})();
