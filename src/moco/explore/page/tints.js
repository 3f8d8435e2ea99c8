// The colour of each image, the legend, and which images the legend and the filter let through.
"use strict";
function tinting(images, changed) {
  const { N, names, labels, clusters, classes, outlier, strange, classOf } = images;
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const PALETTES = { light: images.palette.light.map(rgb), dark: images.palette.dark.map(rgb) };
  const RAMPS = {
    light: ["#cfd3d8", "#efb04a", "#d55e00", "#6d1a00"].map(rgb), dark: ["#3d434b", "#a85a1c", "#f5a742", "#fff0c2"].map(rgb),
  };
  const LIGHTNESS = { light: [0.28, 0.34, 0.385], dark: [0.58, 0.66, 0.77] }; // three to one against the ground, any hue
  const MODES = { label: "Class", cluster: "Cluster", outlier: "Outliers" };
  const theme = () => (isDark() ? "dark" : "light");
  const fromHsl = (hue, saturation, light) => [0, 8, 4].map((n) => {
    const k = (n + hue / 30) % 12;
    return Math.round(255 * (light - saturation * Math.min(light, 1 - light) * clamp(-1, Math.min(k - 3, 9 - k), 1)));
  });
  function palette(group) { // beyond the named colours, hues a golden angle apart
    const named = PALETTES[theme()];
    if (group < 0) return [127, 132, 139];
    return group < named.length ? named[group] : fromHsl((group * 137.5) % 360, 0.5, LIGHTNESS[theme()][group % 3]);
  }
  function unusual(value, stops) {
    const at = clamp(0, (value - strange.low) / (strange.high - strange.low || 1), 1) * (stops.length - 1);
    const i = Math.min(stops.length - 2, Math.floor(at));
    return stops[i].map((from, c) => Math.round(from + (stops[i + 1][c] - from) * (at - i)));
  }

  let mode = labels ? "label" : "cluster";
  let kept = new Set(); // groups pressed in the legend; none: all
  let words = "";
  let selected = null; // rows of the list that is open
  const active = new Uint8Array(N).fill(1); // rows that the filter and the legend let through
  const colours = new Uint8Array(4 * N); // red, green, blue and opacity in turn
  const groupOf = (row) => (mode === "label" ? labels[row] : mode === "cluster" ? clusters[row] : -1);
  const groupName = (group) => (mode === "cluster" ? `Cluster ${group + 1}` : group < 0 ? "No class" : classes[group]);
  const isLit = (row) => active[row] && (!selected || selected.has(row));

  function recolour() {
    const known = new Map(), stops = RAMPS[theme()];
    for (let row = 0; row < N; row++) {
      const group = groupOf(row);
      if (!known.has(group)) known.set(group, palette(group));
      colours.set(mode === "outlier" ? unusual(outlier[row], stops) : known.get(group), 4 * row);
      colours[4 * row + 3] = isLit(row) ? 225 : 34;
    }
    changed();
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
        if (!kept.delete(group)) kept.add(group);
        button.setAttribute("aria-pressed", kept.has(group));
        $("entries").classList.toggle("some", kept.size > 0);
        refilter();
      } }, dot(`rgb(${palette(group)})`), make("span", { textContent: groupName(group) }),
      make("b", { textContent: sizes.get(group).toLocaleString("en") }));
      button.setAttribute("aria-pressed", kept.has(group));
      return make("li", {}, button);
    }));
    if (groups.length > MOST) $("entries").append(make("p", { textContent: `and ${groups.length - MOST} more` }));
    $("entries").classList.toggle("some", kept.size > 0);
    $("scale").hidden = mode !== "outlier";
    $("scale").querySelector("i").style.background = `linear-gradient(90deg, ${RAMPS[theme()].map((stop) => `rgb(${stop})`)})`;
  }
  function setMode(name) {
    mode = name;
    kept = new Set();
    legend();
    refilter();
  }
  for (const [name, text] of Object.entries(MODES)) {
    if (name === "label" && !labels) continue;
    $("modes").append(make("button", { value: name, textContent: text, onclick: () => setMode(name) }));
  }
  return {
    colours, isLit,
    isActive: (row) => active[row] === 1,
    css: (row) => `rgb(${colours.slice(4 * row, 4 * row + 3).join()})`,
    palette: (group) => `rgb(${palette(group)})`,
    begin: () => setMode(mode),
    clear: () => { words = ""; setMode(mode); },
    filter: (text) => { words = text.trim().toLowerCase(); refilter(); },
    matching: () => { // rows, if anything is filtered or not
      const rows = [];
      for (let row = 0; row < N; row++) if (active[row]) rows.push(row);
      return rows;
    },
    select: (rows) => { // a list is open, or none (null)
      const before = selected;
      selected = rows && new Set(rows);
      if (before || selected) recolour();
    },
    groups: (rows) => { // names, first rows and sizes, the largest first; none by outlier score, which has no groups
      if (mode === "outlier") return [];
      const found = new Map();
      for (const row of rows) {
        const group = found.get(groupOf(row));
        if (group) group.size++; else found.set(groupOf(row), { name: groupName(groupOf(row)), row, size: 1 });
      }
      return [...found.values()].sort((a, b) => b.size - a.size);
    },
    theme: () => { legend(); recolour(); },
  };
}
