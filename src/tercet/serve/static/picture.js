// The large view: one picture, what can be asked of it, and where each word is seen.

import { post, show } from "./api.js";
import { draw } from "./heatmap.js";
import { make, meter, percent, title } from "./results.js";

const part = (id) => document.getElementById(id);
const dialog = part("picture");
let hits = [];
let current = 0;
let shown = null; // what the server is asked about: {id} or {base64}
let maps = [];
let visit = 0; // answers that come after the picture was turned are not shown

export function setUp(about, searchLike) {
  part("close").onclick = () => dialog.close();
  part("previous").onclick = () => turn(-1);
  part("next").onclick = () => turn(1);
  part("like").onclick = () => {
    dialog.close();
    searchLike(hits[current]);
  };
  dialog.onclick = (event) => {
    if (event.target === dialog) dialog.close(); // beside the picture
  };
  dialog.onkeydown = (event) => {
    if (event.target.matches("input") || event.target.closest("#words")) return;
    if (event.key === "ArrowLeft") turn(-1);
    if (event.key === "ArrowRight") turn(1);
  };
  part("ask").onsubmit = ask;
  part("why").onsubmit = (event) => {
    event.preventDefault();
    explain(part("sentence").value, false);
  };
  part("words").onkeydown = walkWords;
  new ResizeObserver(redraw).observe(part("frame"));
  if (!about.answers_questions) {
    part("ask").replaceChildren(
      make("p", { className: "facts" }, "The model of this server was not trained to answer questions. Start it with --ask_model to add one that was."),
    );
  }
}

export function open(list, index, sentence) {
  hits = list;
  visitPicture(index);
  part("sentence").value = sentence || hits[index].caption || "";
  if (!dialog.open) dialog.showModal();
}

function turn(step) {
  if (hits[current + step]) visitPicture(current + step);
}

function visitPicture(index) {
  current = index;
  visit += 1;
  const hit = hits[index];
  shown = hit.id ? { id: hit.id } : { base64: hit.base64 };
  maps = [];
  part("frame").style.setProperty("--ratio", hit.width / hit.height);
  part("large").alt = title(hit);
  if (hit.id) show(part("large"), `v1/images/${hit.id}`);
  else part("large").src = hit.source;
  part("picture-title").textContent = title(hit);
  part("facts").textContent = facts(hit).join("\n");
  part("position").textContent = hits.length > 1 ? `${index + 1} of ${hits.length}` : "";
  part("previous").hidden = part("next").hidden = hits.length < 2;
  part("previous").disabled = index === 0;
  part("next").disabled = index === hits.length - 1;
  part("like").hidden = !hit.id;
  part("answer")?.replaceChildren();
  part("fit").textContent = "";
  part("words").replaceChildren();
  part("heat").hidden = true;
}

function facts(hit) {
  const lines = hit.caption && hit.name ? [hit.name] : [];
  lines.push(`${hit.width} × ${hit.height} pixels`);
  const scores = [];
  if (hit.match !== null && hit.match !== undefined) scores.push(`match ${percent(hit.match)}`);
  if (hit.cosine !== undefined) scores.push(`cosine ${hit.cosine.toFixed(3)}`, `rank ${hit.dual_rank} by the dual encoder`);
  if (scores.length) lines.push(scores.join(" · "));
  return lines;
}

function wrong(error) {
  return make("p", { className: "wrong" }, error.message);
}

async function ask(event) {
  event.preventDefault();
  const own = visit;
  const answer = part("answer");
  answer.textContent = "…";
  try {
    const found = await post("v1/ask", { image: shown, question: part("question").value });
    if (own !== visit) return;
    const rows = [{ text: found.answer, score: found.score }, ...found.others];
    answer.replaceChildren(
      make("p", { className: "best" }, found.answer || "(nothing)"),
      make("button", { type: "button", onclick: () => explain(part("question").value, true) }, "Where is that seen?"),
      make("ul", {}, ...rows.map(({ text, score }) =>
        make("li", {}, make("span", { title: text }, text), meter(score), make("span", {}, percent(score))))),
    );
  } catch (error) {
    if (own === visit) answer.replaceChildren(wrong(error));
  }
}

// Where the words of a sentence are, or where those of a question look for its answer.
async function explain(text, answer) {
  const own = visit;
  part("fit").textContent = "…";
  part("words").replaceChildren();
  try {
    const found = await post("v1/explain", { image: shown, text, answer });
    if (own !== visit) return;
    part("fit").textContent = answer
      ? `Where the question looks for its answer, ${found.answer}. Pick a word:`
      : `The whole sentence fits with ${percent(found.match)}. Pick a word:`;
    const whole = answer ? "whole question" : "whole sentence";
    maps = [...found.words, { word: whole, heatmap: found.heatmap, strength: 1 }];
    part("words").replaceChildren(
      ...maps.map(({ word }, index) =>
        make("button", { type: "button", onclick: () => pick(index), className: index === maps.length - 1 ? "whole" : "" }, word)),
    );
    pick(maps.length - 1);
  } catch (error) {
    if (own === visit) part("fit").replaceChildren(wrong(error));
  }
}

// Picking the word that is picked shows the picture itself again.
function pick(index) {
  const buttons = [...part("words").children];
  const again = buttons[index].ariaPressed === "true";
  buttons.forEach((button, other) => (button.ariaPressed = String(other === index && !again)));
  part("heat").hidden = again;
  redraw();
}

function redraw() {
  const index = [...part("words").children].findIndex((button) => button.ariaPressed === "true");
  if (index >= 0 && maps[index]) draw(part("heat"), maps[index].heatmap, maps[index].strength);
}

function walkWords(event) {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const buttons = [...part("words").children];
  const next = step && buttons[buttons.indexOf(event.target) + step];
  if (!next) return;
  event.preventDefault();
  next.focus();
  if (next.ariaPressed !== "true") next.click();
}
