// The map of images: puts the parts together. What is here and in the files beside it is what runs.
"use strict";
(async () => {
  let images;
  try {
    images = await loadImages();
  } catch (error) {
    $("about").textContent = error.message;
    return;
  }
  let view = null;
  document.title = `${images.title}: map of images`;
  $("title").textContent = images.title;
  $("about").textContent = images.about;
  $("note").textContent = images.note;
  const tints = tinting(images, () => view.recolour());
  const thumbnails = thumbnailing(images, () => view.redraw());
  view = viewing(images, tints, thumbnails);
  const panel = panelling(images, tints, thumbnails, view);
  typing(tints, view, panel, pointing(images, tints, thumbnails, view, panel));

  $("close").onclick = panel.close;
  $("in").onclick = () => view.zoom(1.5);
  $("out").onclick = () => view.zoom(1 / 1.5);
  $("fit").onclick = view.fit;
  $("theme").onclick = () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    tints.theme();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", tints.theme);
  const narrow = matchMedia("(max-width: 720px)");
  const hint = () => { $("filter").placeholder = narrow.matches ? "Filter" : "Filter by name or class"; };
  narrow.addEventListener("change", hint);
  hint();
  if (images.search) {
    $("upload").hidden = false;
    $("upload").onclick = () => $("file").click();
    $("file").onchange = () => { if ($("file").files[0]) panel.searchBy($("file").files[0]); $("file").value = ""; };
    addEventListener("dragover", (event) => event.preventDefault());
    addEventListener("drop", (event) => {
      event.preventDefault();
      if (event.dataTransfer.files[0]) panel.searchBy(event.dataTransfer.files[0]);
    });
  }
  tints.begin();
  new ResizeObserver(view.resize).observe($("map"));
  view.resize();
})();
