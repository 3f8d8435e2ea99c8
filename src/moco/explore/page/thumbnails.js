// Small images, on sheets of 256 that come when they are wanted.
"use strict";
function thumbnailing(images, arrived) {
  const { cell, across, slots } = images, PER_SHEET = across * across, MOST_SHEETS = 96;
  const sheets = new Map(); // number -> { image, sizes }, the least recently used first
  const loading = new Map();
  let wanted = new Set();
  function load(number) {
    if (sheets.has(number)) return Promise.resolve(sheets.get(number));
    if (!loading.has(number)) {
      loading.set(number, (async () => {
        let sheet = { sizes: [], image: null };
        try {
          const { sizes, image: source } = await images.sheet(number);
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
        arrived();
        return sheet;
      })());
    }
    return loading.get(number);
  }
  function place(row, sheet) { // arguments of drawImage: the sheet, and where on it
    const at = slots[row] % PER_SHEET, size = sheet.sizes[at];
    if (!sheet.image || !size || !size[0]) return null;
    return [sheet.image, at % across * cell, Math.floor(at / across) * cell, ...size];
  }
  function stamp(context, found, x, y, w, h) {
    context.imageSmoothingQuality = "high";
    context.drawImage(...found, x, y, w, h);
  }
  return {
    stamp,
    ready(row) { // null: it has yet to come, and is noted as wanted, or cannot be read
      const number = Math.floor(slots[row] / PER_SHEET), sheet = sheets.get(number);
      if (!sheet) { wanted.add(number); return null; }
      if (sheets.size > MOST_SHEETS / 2) { sheets.delete(number); sheets.set(number, sheet); }
      return place(row, sheet);
    },
    box(found, length) { // width and height at which a thumbnail is drawn
      const grown = length / Math.max(found[3], found[4]);
      return [found[3] * grown, found[4] * grown];
    },
    async paint(canvas, row, pixels) { // false: it cannot be read
      const found = place(row, await load(Math.floor(slots[row] / PER_SHEET)));
      const [w, h] = found ? found.slice(3) : [1, 1];
      const grown = pixels / Math.max(w, h);
      Object.assign(canvas, { width: Math.round(w * grown), height: Math.round(h * grown) });
      if (found) stamp(canvas.getContext("2d"), found, 0, 0, canvas.width, canvas.height);
      return found !== null;
    },
    forget: () => { wanted = new Set(); },
    fetch() { // two at a time, for what is wanted may be other by then; how many are
      for (const number of wanted) {
        if (loading.size >= 2) break;
        load(number);
      }
      return wanted.size;
    },
  };
}
