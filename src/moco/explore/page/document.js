// Elements by their id, elements made, and words. Names of files and classes reach the document as text only, never as
// markup.
"use strict";
const $ = (id) => document.getElementById(id);
function make(tag, given = {}, ...children) {
  const element = Object.assign(document.createElement(tag), given);
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
}
function dot(colour) {
  const spot = make("i", { className: "dot" });
  spot.style.background = colour;
  return spot;
}
const clamp = (low, value, high) => Math.min(high, Math.max(low, value));
const count = (number, noun = "image") => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
const announce = (text) => { $("status").textContent = text; };
const isDark = () => (document.documentElement.dataset.theme
  || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
