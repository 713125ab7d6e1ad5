"""The look of a report, light and dark, on a screen and on paper."""

STYLE = """
:root {
  color-scheme: light dark; font-size: 15px;
  --text: #1a202c; --quiet: #5a6577; --page: #fff; --card: #f4f6f9; --edge: #d5dbe3;
  --blue: #2b6cb0; --soft: #b9c6d6; --orange: #c05621;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --text: #e4e8ee; --quiet: #a3adbb; --page: #14181e; --card: #1e242c; --edge: #38414d;
    --blue: #63a4e8; --soft: #4a5868; --orange: #f0955a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem; max-width: 76rem;
  font: 1rem/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
}
h1 { margin: 0; font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { margin: 2rem 0 .6rem; font-size: 1.15rem; }
p { margin: .4rem 0; }
a { color: var(--blue); text-decoration: none; }
code { font-size: .93em; }
.quiet, figcaption { color: var(--quiet); font-size: .9rem; }
.warning { color: var(--orange); }

.cards { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.2rem 0; }
.cards div { flex: 1 1 9rem; padding: .6rem .9rem; background: var(--card); border-radius: .5rem; }
dt { color: var(--quiet); font-size: .85rem; }
dd { margin: 0; font-size: 1.3rem; font-weight: 600; }
dd small { display: block; color: var(--quiet); font-size: .8rem; font-weight: 400; }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
tr > * { border-bottom: 1px solid var(--edge); }
th, td { padding: .25rem .6rem; text-align: left; }
thead th { color: var(--quiet); }
tbody th { font-weight: 400; }
tfoot { display: table-row-group; font-weight: 600; }
.layers { width: 100%; font-size: .9rem; white-space: nowrap; }
.number { text-align: right; }

details { margin: .4rem 0; padding: .4rem .8rem; background: var(--card); border-radius: .5rem; }
summary { cursor: pointer; overflow-wrap: anywhere; }
.pair { display: flex; flex-wrap: wrap; gap: 1rem 2rem; scroll-margin-top: 3rem; }
.pair > * { flex: 0 1 460px; min-width: 0; }
figure { margin: .5rem 0; max-width: 100%; }

svg { display: block; max-width: 100%; height: auto; }
.scroll svg { max-width: none; }
text { fill: var(--quiet); font: 11px system-ui, sans-serif; }
path { fill: none; stroke-linejoin: round; }
.inside { fill: var(--page); }
.bar, .mark { fill: var(--blue); }
.soft { fill: var(--soft); }
.dot { fill: var(--page); stroke: var(--orange); stroke-width: 2; }
.axis { stroke: var(--quiet); }
.grid { stroke: var(--edge); }
.line, .stem { stroke: var(--blue); stroke-width: 2; }
.stem.thin { stroke-width: 1; }
.used { stroke: var(--blue); }
.idle { stroke: var(--orange); stroke-width: 2; }
.accent { stroke: var(--orange); stroke-width: 1.5; stroke-dasharray: 5 4; }
.faint { stroke: var(--quiet); stroke-dasharray: 2 3; }

@media print {
  :root { font-size: 11px; }
  body { padding: 0; max-width: none; }
  figure, tr, .cards, details { break-inside: avoid; }
  h2 { break-after: avoid; }
  .pair { flex-wrap: nowrap; }
  .scroll svg { max-width: 100%; }
  details { background: none; }
  details::details-content { content-visibility: visible; display: block; }
}
"""
