"""The style of the HTML report: system fonts, one column, light, dark and print."""

from __future__ import annotations

STYLE = """
:root {
  --paper: #fbfbfa; --card: #ffffff; --ink: #1d1f23; --soft: #5b616b; --line: #e2e3e6;
  --accent: #2469a3; --tint: #f1f4f8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #141518; --card: #1b1d21; --ink: #dcdfe4; --soft: #9aa1ac; --line: #30333a;
    --accent: #79b4e8; --tint: #22262d;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 54rem; margin: 0 auto; padding: 2.5rem 1.25rem 3.5rem; }
header p { margin: .35rem 0; max-width: 42rem; color: var(--soft); }
h1 { margin: 0 0 .75rem; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; }
h2 { margin: 0 0 .8rem; font-size: 1.12rem; line-height: 1.3; }
section { margin-top: 2.6rem; }
.highlights {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 1.6rem 0 0; padding: 0; list-style: none;
}
.highlights li {
  padding: .8rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem;
}
.highlights strong {
  display: block; font-size: 1.6rem; line-height: 1.25; color: var(--accent);
  font-variant-numeric: tabular-nums;
}
.highlights span { font-size: .88rem; line-height: 1.35; color: var(--soft); }
.wide { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .75rem; text-align: left; border-bottom: 1px solid var(--line); }
.number { text-align: right; white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: .25rem; }
tbody th { font-weight: 400; }
thead th { font-size: .85rem; font-weight: 600; color: var(--soft); vertical-align: bottom; }
thead tr { border-bottom: 1px solid var(--soft); }
.note, figcaption { margin: .6rem 0 0; font-size: .88rem; color: var(--soft); }
figure { margin: 0; }
.picture {
  padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  overflow-x: auto;
}
.picture svg, .picture img { display: block; width: 100%; height: auto; margin: 0 auto; }
.picture svg { max-width: 38rem; }
.picture svg.prunus-figure { color: inherit; }
.picture img {
  max-width: 32rem; image-rendering: pixelated; background: var(--tint);
  outline: 1px solid var(--line);
}
pre {
  margin: 0 0 1rem; padding: .75rem 1rem; background: var(--tint); border-radius: .5rem;
  overflow-x: auto; font: .88rem/1.5 ui-monospace, "SF Mono", Consolas, "DejaVu Sans Mono",
  monospace;
}
dl { margin: 0; font-size: .88rem; }
dl div { display: flex; gap: 1rem; padding: .25rem 0; border-bottom: 1px solid var(--line); }
dt { flex: 0 0 9rem; color: var(--soft); }
dd { flex: 1; margin: 0; overflow-wrap: anywhere; }
@media (max-width: 36rem) {
  main { padding: 1.5rem 1rem 2.5rem; }
  h1 { font-size: 1.5rem; }
  section { margin-top: 2rem; }
  table { font-size: .9rem; }
  th, td { padding: .4rem .5rem; }
  .picture { padding: .5rem; }
  .number { white-space: normal; }
  td:last-child:not(.number) { min-width: 10rem; }
  .picture img { image-rendering: auto; }
  dt { flex-basis: 6.5rem; }
}
@media print {
  :root {
    --paper: #ffffff; --card: #ffffff; --ink: #000000; --soft: #444444; --line: #bbbbbb;
    --accent: #000000; --tint: #ffffff;
  }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  section { break-inside: avoid; margin-top: 1.4rem; }
  .wide, .picture, pre { overflow: visible; }
  .picture { padding: 0; border: 0; }
  h2 { break-after: avoid; }
}
"""
