// Search results: a grid of thumbnails, or two orders side by side.

import { show } from "./api.js";

export const percent = (value) => `${(100 * value).toFixed(value > 0.0995 && value < 0.9995 ? 0 : 1)}\u00a0%`;

export function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

export function meter(value) {
  const bar = make("i");
  bar.style.width = `${Math.max(0, Math.min(1, value)) * 100}%`;
  return make("span", { className: "meter" }, bar);
}

export const title = (hit) => hit.caption || hit.name;

function score(hit) {
  if (hit.cosine === undefined) return ""; // shown without a search
  return hit.match === null ? `cosine ${hit.cosine.toFixed(3)}` : `match ${percent(hit.match)}`;
}

function card(hit, rank, open, move, brief) {
  const picture = make("img", { alt: title(hit), loading: "lazy", decoding: "async" });
  show(picture, `v1/thumbnails/${hit.id}`);
  const under = make("span", { className: "under" });
  if (score(hit)) under.append(make("span", { className: "score" }, brief ? score(hit).split(" ")[1] : score(hit)));
  if (move) under.append(move);
  if (typeof hit.match === "number") under.append(meter(hit.match));
  under.append(make("span", { className: "words-under" }, title(hit)));
  const button = make("button", { type: "button", className: "hit", onclick: () => open(rank) });
  button.dataset.id = hit.id;
  return [button, picture, under];
}

export function drawGrid(list, hits, open) {
  list.replaceChildren(
    ...hits.map((hit, rank) => {
      const [button, picture, under] = card(hit, rank, open);
      button.append(picture, under);
      return make("li", {}, button);
    }),
  );
}

// How far re-ranking moved a picture, shown beside its score.
function moved(hit, rank) {
  const steps = hit.dual_rank - (rank + 1);
  if (!steps) return make("span", { className: "move down" }, "=");
  const words = `${Math.abs(steps)} ${steps > 0 ? "up" : "down"}`;
  const sign = `${steps > 0 ? "▲" : "▼"} ${Math.abs(steps)}`;
  return make("span", { className: `move ${steps > 0 ? "up" : "down"}`, ariaLabel: words, title: words }, sign);
}

export function drawOrder(list, hits, open, withMoves) {
  list.replaceChildren(
    ...hits.map((hit, rank) => {
      const [button, picture, under] = card(hit, rank, open, withMoves && moved(hit, rank), true);
      button.append(make("span", { className: "rank" }, String(rank + 1)), picture, under);
      return make("li", {}, button);
    }),
  );
}

// Arrow keys walk over the pictures as they are laid out.
export function walk(event) {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!steps || !event.target.classList.contains("hit")) return;
  const own = event.target.getBoundingClientRect();
  const middle = (box) => [box.left + box.width / 2, box.top + box.height / 2];
  const [x, y] = middle(own);
  let nearest = null;
  let least = Infinity;
  for (const other of document.querySelectorAll("#results .hit")) {
    const box = other.getBoundingClientRect();
    if (!box.width || other === event.target) continue;
    const [across, down] = [middle(box)[0] - x, middle(box)[1] - y];
    const along = across * steps[0] + down * steps[1];
    const aside = Math.abs(across * steps[1]) + Math.abs(down * steps[0]);
    if (along > 4 && along + 4 * aside < least) [nearest, least] = [other, along + 4 * aside];
  }
  if (nearest) {
    event.preventDefault();
    nearest.focus();
  }
}
