// The panel beside the map: one image and its neighbours, or a list of images.
"use strict";
function panelling(images, tints, thumbnails, view) {
  const { names, classes, classOf, base, folder, labels, clusters, outlier, percent } = images;
  const details = $("details"), panel = $("panel"), { marks } = view, MOST_TILES = 240, MOST_BARS = 8;
  const similar = (value) => value.toFixed(2).replace("-", "\u2212");
  let opener = null; // what had the focus before
  function open(title, ...children) {
    if (panel.hidden) opener = document.activeElement;
    panel.hidden = false;
    panel.scrollTop = 0;
    details.replaceChildren(title, ...children);
    view.resize();
  }
  function close() {
    if (panel.hidden) return;
    const inside = panel.contains(document.activeElement);
    panel.hidden = true;
    tints.select(null);
    view.mark({});
    view.resize();
    if (inside) (opener && opener.isConnected ? opener : $("map")).focus();
  }
  function tile(row, text) {
    const canvas = make("canvas", { width: 96, height: 96 });
    const button = make("button", { className: "tile", title: names[row], onclick: () => openImage(row, true) },
      canvas, make("span", {}, dot(tints.css(row)), make("em", { textContent: text })));
    button.dataset.row = row;
    button.setAttribute("aria-label", [base(row), classOf(row), text].filter(Boolean).join(", "));
    thumbnails.paint(canvas, row, 96);
    return button;
  }
  const tiles = (rows, similarity) => make("div", { className: "tiles" },
    ...rows.map((row, i) => tile(row, similarity ? similar(similarity[i]) : classOf(row))));
  const fact = (name, ...value) => [make("dt", { textContent: name }), make("dd", {}, ...value)];

  async function openImage(row, focus = false) {
    tints.select(null);
    view.mark({ chosen: row });
    const frame = make("div", { className: "picture" }), title = make("h2", { textContent: base(row), tabIndex: -1 });
    title.append(make("small", { textContent: folder(row) }));
    const unreadable = () => frame.replaceChildren(make("p", { textContent: "This image cannot be read." }));
    if (images.saved) {
      const canvas = make("canvas");
      thumbnails.paint(canvas, row, 300).then((there) => there || unreadable());
      frame.append(canvas);
    } else {
      const image = make("img", { alt: base(row), src: `image/${row}`, onerror: unreadable });
      image.onload = () => image.classList.toggle("crisp", image.naturalWidth <= 128);
      frame.append(image);
    }
    const facts = make("dl", {},
      ...(classOf(row) ? fact("Class", dot(tints.palette(labels[row])), classOf(row)) : []),
      ...fact("Cluster", dot(tints.palette(clusters[row])), String(clusters[row] + 1)),
      ...fact("Outlier score", `${outlier[row].toFixed(3)}, above ${percent(row)} % of the images`));
    const list = make("section", {}, make("h3", { textContent: "Most similar" }));
    open(title, frame, facts, list);
    view.flyTo(row); // it may be another's neighbour, far away, or lie where the panel is now
    if (focus) title.focus();
    announce([base(row), classOf(row)].filter(Boolean).join(", "));
    try {
      const found = await images.neighbours(row);
      if (marks.chosen !== row) return;
      marks.linked = found.rows;
      list.append(tiles(found.rows, found.similarity));
    } catch (error) {
      list.append(make("p", { textContent: error.message }));
    }
    view.redraw();
  }
  function openList(rows, path = null) {
    tints.select(rows);
    view.mark({ path });
    const groups = tints.groups(rows), more = groups.length - MOST_BARS;
    const bars = make("div", { className: "bars" }, ...groups.slice(0, MOST_BARS).map(({ name, row, size }) => {
      const bar = make("i");
      bar.style.background = tints.css(row);
      bar.style.width = `${Math.max(3, 100 * size / groups[0].size)}%`;
      return make("div", {}, make("span", { textContent: name }), bar, make("b", { textContent: size.toLocaleString("en") }));
    }), more > 0 ? make("small", { textContent: `and ${more} more` }) : "");
    const few = rows.length <= MOST_TILES;
    open(make("h2", { textContent: `${count(rows.length)} selected` }),
      make("div", { className: "row" },
        make("button", { id: "save", className: "main", textContent: "Save list", onclick: () => saveList(rows) }),
        make("button", { textContent: "Clear", onclick: close })),
      bars, tiles(rows.slice(0, MOST_TILES)),
      few ? "" : make("small", { textContent: `The first ${MOST_TILES} are shown; the list holds all.` }));
    announce(`${count(rows.length)} selected`);
  }
  function saveList(rows) {
    const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    const lines = rows.map((row) => [images.root + names[row], ...(classes ? [classOf(row)] : [])].map(quoted).join());
    const text = [classes ? "path,class" : "path", ...lines, ""].join("\n");
    const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: "text/csv" })), download: "selection.csv" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
  async function searchBy(file) {
    tints.select(null);
    view.mark({});
    const image = make("img", { alt: file.name, src: URL.createObjectURL(file) });
    const list = make("section", {}, make("h3", { textContent: "Most similar" }));
    open(make("h2", { textContent: file.name }), make("div", { className: "picture" }, image), list);
    image.onload = image.onerror = () => URL.revokeObjectURL(image.src);
    try {
      const found = await images.searchBy(file);
      marks.linked = found.rows;
      list.append(tiles(found.rows, found.similarity));
      announce(`${count(found.rows.length)} found`);
    } catch (error) {
      list.replaceChildren(make("p", { textContent: error.message }));
      announce(error.message);
    }
    view.redraw();
  }
  return { close, openImage, openList, searchBy, isOpen: () => !panel.hidden };
}
