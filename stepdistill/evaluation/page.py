"""The page's frame, looks and behaviour: plain HTML, CSS and JavaScript, nothing that has to be fetched."""

from __future__ import annotations

INK = "#1c2733"
"""Text and axes of plots; inside a page it becomes the page's own text colour, so that a dark page stays readable."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
{body}
</main>
<script>{js}</script>
</body>
</html>
"""

CSS = """
:root { --text: #1c2733; --soft: #5b6875; --ground: #fff; --line: #dde3e8; --panel: #f5f7f9; --tint: #d8efe4;
  --accent: #1f6fb2; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e8ec; --soft: #9aa6b1; --ground: #14181c; --line: #313a43; --panel: #1c2228; --tint: #1d4536;
    --accent: #6fb4ea; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.1rem; margin: 2.75rem 0 0.75rem; padding-bottom: 0.3rem; border-bottom: 1px solid var(--line); }
p { max-width: 44rem; }
.headline { font-size: 1.2rem; }
.small, .notes { color: var(--soft); font-size: 0.85rem; }
.notes { padding-left: 1.1rem; max-width: 60rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; }
#results { min-width: 100%; }
th, td { padding: 0.35rem 0.5rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; }
thead th:not(:first-child) { text-align: right; }
tbody th { font-weight: 600; }
#results th:first-child { position: sticky; left: 0; background: inherit; min-width: 8rem; white-space: normal; }
thead tr, tbody tr { background: var(--ground); }
tr.teacher { background: var(--panel); }
tr.teacher th { font-weight: 400; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.best { background: var(--tint); font-weight: 600; }
thead button { all: unset; cursor: pointer; color: var(--soft); font-weight: 600; }
thead button:hover { color: var(--text); }
:focus-visible, thead button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
th[aria-sort="ascending"] button::after { content: " \\25B4"; }
th[aria-sort="descending"] button::after { content: " \\25BE"; }
.how { display: block; color: var(--soft); font-size: 0.8em; font-weight: 400; line-height: 1.3; }
@media (min-width: 50rem) { #results th:first-child { min-width: 11.5rem; } }
figure { margin: 0; }
figcaption { color: var(--soft); font-size: 0.85rem; line-height: 1.35; margin: 0.25rem 0; }
figcaption b { color: var(--text); font-weight: 600; }
.grids, .plots, .curves { display: grid; gap: 1.5rem; align-items: start; }
.grids { grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.curves { grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
.grids img, .strip { width: 100%; max-width: 27rem; height: auto; image-rendering: pixelated; display: block; }
.strip { width: auto; height: 5rem; max-width: 100%; object-fit: contain; object-position: left; margin: 0.5rem 0; }
.slider { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; align-items: center; gap: 0.25rem 1rem;
  padding: 0.6rem 0; margin-bottom: 0.75rem; background: var(--ground); border-bottom: 1px solid var(--line); }
.slider label { font-weight: 600; }
.slider input { flex: 1 1 12rem; max-width: 26rem; height: 1.5rem; accent-color: var(--accent); }
.slider output { min-width: 5rem; font-variant-numeric: tabular-nums; font-weight: 600; }
.absent { order: 1; }
.absent .missing { padding: 1rem; border: 1px dashed var(--line); color: var(--soft); font-size: 0.85rem; margin: 0; }
[hidden] { display: none !important; }
details { border-bottom: 1px solid var(--line); padding: 0.4rem 0; }
summary { cursor: pointer; }
summary span { color: var(--soft); font-size: 0.85rem; }
details table { margin: 0.5rem 0 0.75rem; }
details td:first-child { white-space: normal; }
svg { width: 100%; height: auto; }
svg text { font-family: inherit !important; }
pre { background: var(--panel); padding: 0.9rem; overflow-x: auto; font-size: 0.85rem; line-height: 1.45; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 1rem; font-size: 0.85rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
"""

JS = """
const table = document.getElementById("results");
table.querySelectorAll("thead th").forEach((head, column) => head.addEventListener("click", () => {
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  table.querySelectorAll("thead th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const value = row => row.children[column].dataset.value;
  const compare = (a, b) => a === "" || b === "" ? (a === "") - (b === "")
    : sign * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => compare(value(a), value(b))));
}));
const slider = document.getElementById("steps");
if (slider) {
  const counts = slider.dataset.steps.split(" ");
  const show = () => {
    const steps = counts[slider.value], words = steps + (steps === "1" ? " step" : " steps");
    slider.setAttribute("aria-valuetext", words);
    slider.nextElementSibling.value = words;
    document.querySelectorAll("figure[data-serves]").forEach(figure => {
      const serves = figure.dataset.serves.split(" ").includes(steps);
      figure.classList.toggle("absent", !serves);
      figure.querySelectorAll("[data-steps]").forEach(part => { part.hidden = part.dataset.steps !== steps; });
      figure.querySelector(".missing").hidden = serves;
    });
  };
  slider.addEventListener("input", show);
  show();  // a reloaded page keeps its slider where it was
}
"""
