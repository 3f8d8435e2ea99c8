// What is known of the images, by row: from the server, or out of the page itself.
"use strict";
async function loadImages() {
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
  const data = saved ? JSON.parse($("data").textContent) : await ask("data.json");
  const { names, classes } = data, N = names.length;
  const labels = data.labels && unpack(data.labels), outlier = unpack(data.outlier), order = unpack(data.order);
  const slots = new Uint32Array(N); // place of each row in the order
  order.forEach((row, slot) => { slots[row] = slot; });
  const ranked = Float32Array.from(outlier).sort();
  const near = data.near && { rows: unpack(data.near.rows), similarity: unpack(data.near.similarity) };
  const end = (row) => names[row].search(/[^/\\]*$/);
  return {
    ...data, N, saved, labels, outlier, order, slots,
    clusters: unpack(data.clusters),
    xy: Float32Array.from(unpack(data.xy), (value) => value / 65535), // x and y in turn
    strange: { low: ranked[Math.floor(0.02 * (N - 1))], high: ranked[Math.ceil(0.98 * (N - 1))] },
    base: (row) => names[row].slice(end(row)),
    folder: (row) => names[row].slice(0, end(row)),
    classOf: (row) => (labels && labels[row] >= 0 ? classes[labels[row]] : ""),
    percent: (row) => { // of the images that are less strange
      let low = 0, high = N;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (ranked[middle] < outlier[row]) low = middle + 1; else high = middle;
      }
      return Math.round(100 * low / N);
    },
    sheet: async (number) => (saved ? data.sheets[number] : ask(`sheet/${number}`)),
    searchBy: (file) => ask("search", { method: "POST", body: file }),
    neighbours: async (row) => {
      if (!near) return ask(`neighbours/${row}`);
      const k = near.rows.length / N, from = row * k, to = from + k;
      const similarity = Array.from(near.similarity.subarray(from, to), (step) => step / 10000 - 1);
      return { rows: [...near.rows.subarray(from, to)], similarity };
    },
  };
}
