"""The look of the report page."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --card: #ffffff; --ink: #1c2329; --soft: #5b6670; --line: #e3e1da;
  --accent: #0b6aa8; --right: #12805c; --on-right: #ffffff; --warn: #fdf3d8; --warn-line: #d9a514;
  --run-1: #0b6aa8; --run-2: #c2500a; --run-3: #12805c; --run-4: #8f3ea3; --run-5: #7d6500; --run-6: #b3263a; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181b; --card: #1c2226; --ink: #e8e6e1; --soft: #a0abb3; --line: #323a40; --accent: #6cb8ea;
    --right: #52c99b; --on-right: #0d1a14; --warn: #332b14; --warn-line: #b98d1c;
    --run-1: #6cb8ea; --run-2: #f0924c; --run-3: #52c99b; --run-4: #cf92e3; --run-5: #d6bb48; --run-6: #f08a98; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 2.2rem 1.25rem 3rem; }
h1 { font-size: clamp(1.7rem, 4vw, 2.4rem); line-height: 1.15; margin: 0 0 1.1rem; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .5rem; }
small, .legend, footer, .kicker { color: var(--soft); font-weight: 400; font-size: .85rem; }
h2 small, h3 small { margin-left: .35rem; }
.kicker { margin: 0 0 .2rem; text-transform: uppercase; letter-spacing: .08em; font-size: .75rem; }
.legend { margin: -.3rem 0 .9rem; }
.facts { display: flex; flex-wrap: wrap; gap: .9rem 2.2rem; margin: 0; padding: 1rem 0; border: solid var(--line);
  border-width: 1px 0; }
.facts dt { color: var(--soft); font-size: .78rem; }
.facts dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
aside { background: var(--warn); border-left: 4px solid var(--warn-line); padding: .8rem 1.1rem; margin: 1.6rem 0 0;
  border-radius: 4px; }
aside h2 { font-size: 1rem; margin: 0 0 .3rem; }
aside ul { margin: 0; padding-left: 1.1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .8rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th, thead td { color: var(--soft); font-weight: 600; font-size: .85rem; border-bottom-color: var(--soft); }
.message { overflow-wrap: anywhere; min-width: 14rem; }
.tables { display: grid; gap: .5rem 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
.recall { width: 100%; max-width: 44rem; }
.recall td { width: 28%; }
.recall tbody th { font-weight: 500; }
.recall .group th { color: var(--soft); font-size: .85rem; padding-top: .8rem; }
.recall .mean > * { font-weight: 700; border-bottom: 0; }
.recall i { display: block; height: 4px; margin-top: 3px; background: var(--accent); border-radius: 2px;
  min-width: 1px; }
.tables + .panels { margin-top: 1.2rem; }
.panels { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem .8rem .3rem; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 .8rem; font-size: .9rem;
  font-weight: 600; }
figcaption code { color: var(--soft); font-weight: 400; }
.last { font-weight: 400; color: var(--soft); font-variant-numeric: tabular-nums; white-space: nowrap; }
.last b { color: var(--ink); }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
.gallery { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; }
article h3 { margin: 0; font-size: .95rem; line-height: 1.35; overflow-wrap: anywhere; }
.rank { margin: .1rem 0 .6rem; font-size: .82rem; color: var(--soft); }
.hit .rank { color: var(--right); }
article ol { list-style: none; margin: 0; padding: 0; display: grid; gap: .45rem;
  grid-template-columns: repeat(auto-fit, minmax(54px, 1fr)); }
article li { position: relative; text-align: center; }
article img, .blank { display: block; width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 4px;
  outline: 1px solid var(--line); background: var(--paper); }
.blank { font-size: .7rem; color: var(--soft); padding-top: 35%; }
.right img, .right .blank { outline: 4px solid var(--right); outline-offset: -1px; }
.tick { position: absolute; top: -5px; left: -5px; width: 1.35rem; height: 1.35rem; line-height: 1.35rem;
  border-radius: 50%; background: var(--right); color: var(--on-right); font-size: .85rem; font-weight: 700; }
.score { font-size: .72rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.right .score { font-weight: 700; color: var(--ink); }
.matrix { font-size: .72rem; }
.matrix th, .matrix td { padding: .15rem .3rem; border: 0; text-align: center; vertical-align: middle; }
.matrix th[scope=row] { font-weight: 400; text-align: left; min-width: 14rem; max-width: 24rem; }
.matrix img { width: 2.6rem; max-width: none; aspect-ratio: 1; object-fit: cover; border-radius: 3px; display: block; }
.matrix td { background: color-mix(in srgb, var(--accent) var(--share, 0%), var(--card)); min-width: 2.6rem; }
.matrix .strong { color: var(--paper); }
.matrix .own { outline: 2px solid var(--ink); outline-offset: -2px; }
.matrix .best { text-decoration: underline; font-weight: 700; }
.maps { display: grid; gap: 1rem; }
.maps ol { grid-template-columns: repeat(auto-fill, 92px); }
.maps .score { overflow-wrap: anywhere; display: block; line-height: 1.2; margin-top: .2rem; }
.runs th[scope=col] { min-width: 8rem; }
.key { display: inline-block; width: 1.6rem; height: .35rem; border-radius: 2px; vertical-align: middle;
  margin-right: .4rem; }
.runs .top { font-weight: 700; }
.runs code { font-size: .85rem; overflow-wrap: anywhere; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem 1rem; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font-size: .82rem; line-height: 1.45; }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: .8rem; }
@media (max-width: 480px) { main { padding: 1.4rem .9rem 2rem; } th, td { padding: .35rem .5rem; } }
@media print { article, figure { break-inside: avoid; } }
"""
