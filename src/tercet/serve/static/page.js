// The page: what is searched for, where it is kept in the address, and how results are shown.

import { get, post, useKey } from "./api.js";
import { open, setUp } from "./picture.js";
import { drawGrid, drawOrder, make, walk } from "./results.js";

const part = (id) => document.getElementById(id);
const RAW_BYTES = 1_500_000; // larger pictures are made smaller before they are sent: the model sees a few hundred pixels
const SIDE = 1024;
let about = null;
let picture = null; // {id, name, ...} of the index, or {base64, source, width, height, name} that was dropped
let running = null; // aborts the search that is under way
let results = {}; // hits by order

function order() {
  return document.querySelector("[name=order]:checked").value;
}

function query() {
  const body = { k: Number(part("count").value) };
  const text = part("text").value.trim();
  const without = part("without").value.trim();
  if (text) body.text = text;
  if (without) body.without = without;
  if (picture) body.image = picture.id ? { id: picture.id } : { base64: picture.base64 };
  return body;
}

async function search() {
  const body = query();
  if (!body.text && !body.image) {
    part("text").focus();
    return;
  }
  results = {};
  await load(body);
}

// Fetch what the chosen order needs and has not got.
async function load(body = query()) {
  running?.abort();
  const own = (running = new AbortController());
  part("notice").hidden = true;
  document.body.classList.add("busy");
  try {
    const words = Boolean(body.text);
    const needed = !words ? ["dual"] : { reranked: ["reranked"], dual: ["dual"], compare: ["dual", "reranked"] }[order()];
    const missing = needed.filter((name) => !results[name]);
    const found = await Promise.all(
      missing.map((name) => post("v1/search", name === "dual" ? { ...body, rerank: 0 } : body, own.signal)),
    );
    missing.forEach((name, index) => (results[name] = found[index]));
    drawResults(words);
  } catch (error) {
    if (error.name !== "AbortError") fail(error, () => load(body));
  } finally {
    if (running === own) document.body.classList.remove("busy");
  }
}

function drawResults(words) {
  const chosen = words ? order() : "dual";
  const main = results[chosen === "compare" ? "reranked" : chosen];
  const count = main.hits.length;
  part("newest").hidden = true;
  part("bar").hidden = false;
  part("order").hidden = !words;
  part("summary").textContent = count
    ? `${count} picture${count > 1 ? "s" : ""} of ${about.images.toLocaleString("en")} in ${Math.round(1000 * main.seconds)} ms`
    : "";
  part("hint").textContent = count ? "" : "Nothing was found.";
  part("grid").hidden = chosen === "compare";
  part("compare").hidden = chosen !== "compare";
  const opener = (hits) => (rank) => open(hits, rank, part("text").value.trim());
  if (chosen === "compare") {
    drawOrder(part("dual"), results.dual.hits, opener(results.dual.hits), false);
    drawOrder(part("reranked"), results.reranked.hits, opener(results.reranked.hits), true);
  } else {
    drawGrid(part("grid"), main.hits, opener(main.hits));
  }
}

function fail(error, again) {
  if (error.status === 401) {
    part("key").hidden = false;
    part("key-text").focus();
    part("key").onsubmit = (event) => {
      event.preventDefault();
      useKey(part("key-text").value.trim());
      part("key").hidden = true;
      again();
    };
    return;
  }
  if (!part("grid").children.length) part("hint").textContent = "";
  part("notice-text").textContent = error.message;
  part("notice").hidden = false;
  part("again").onclick = () => {
    part("notice").hidden = true;
    again();
  };
}

function setPicture(next) {
  if (picture?.source && picture.source !== next?.source) URL.revokeObjectURL(picture.source);
  picture = next;
  part("chip").hidden = !picture;
  part("text").placeholder = picture ? "and words, if you like" : "What to look for";
  if (!picture) part("chip-image").removeAttribute("src");
  else if (picture.source) part("chip-image").src = picture.source;
  else part("chip-image").src = document.querySelector(`[data-id="${CSS.escape(picture.id)}"] img`)?.src ?? `v1/thumbnails/${picture.id}`;
}

async function searchByFile(file) {
  if (!file) return;
  try {
    setPicture(await readPicture(file));
  } catch (error) {
    fail(error, () => searchByFile(file));
    return;
  }
  saveSearch();
  search();
}

async function readPicture(file) {
  let bitmap = null;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    // Not every picture that the server reads is one that the browser shows; the server says what is wrong with it.
  }
  let blob = file;
  if (bitmap && file.size > RAW_BYTES) {
    const scale = Math.min(1, SIDE / Math.max(bitmap.width, bitmap.height));
    const canvas = new OffscreenCanvas(Math.max(1, Math.round(bitmap.width * scale)), Math.max(1, Math.round(bitmap.height * scale)));
    const pen = canvas.getContext("2d");
    pen.fillStyle = "white";
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    blob = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
  }
  if (blob.size * 1.34 > about.body_bytes) throw new Error("This file is too large to be sent.");
  const base64 = (await asDataAddress(blob)).split(",")[1] ?? "";
  if (!base64) throw new Error("This file is empty.");
  const [width, height] = bitmap ? [bitmap.width, bitmap.height] : [1, 1];
  return { base64, source: URL.createObjectURL(blob), width, height, name: file.name || "pasted picture" };
}

function asDataAddress(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("This file cannot be read."));
    reader.readAsDataURL(blob);
  });
}

function searchLike(hit) {
  part("text").value = "";
  setPicture({ id: hit.id, name: hit.name, caption: hit.caption, width: hit.width, height: hit.height });
  saveSearch();
  search();
  scrollTo({ top: 0 });
}

// A search is kept in the URL, so that it can be reloaded, shared and gone back to; a dropped picture cannot be.
function saveSearch() {
  const address = new URLSearchParams();
  if (part("text").value.trim()) address.set("q", part("text").value.trim());
  if (part("without").value.trim()) address.set("without", part("without").value.trim());
  if (picture?.id) address.set("like", picture.id);
  const next = address.size ? `?${address}` : location.pathname;
  if (next !== location.search) history.pushState(null, "", next);
}

function loadSearch() {
  const address = new URLSearchParams(location.search);
  part("text").value = address.get("q") ?? "";
  part("without").value = address.get("without") ?? "";
  part("options").open = Boolean(part("without").value);
  const like = address.get("like");
  setPicture(like ? { id: like, name: like, width: 1, height: 1 } : null);
  if (like || part("text").value) search();
  else clear();
}

function clear() {
  running?.abort();
  results = {};
  part("notice").hidden = part("bar").hidden = part("compare").hidden = true;
  part("grid").replaceChildren();
  if (about.images) {
    part("hint").textContent = "Type what you look for, or drop a picture anywhere on this page.";
    showNewest();
  } else {
    part("hint").replaceChildren("This index holds no pictures yet.", make("br"), make("code", {}, "tercet index FOLDER --model MODEL --output INDEX"));
  }
}

// Before anything is searched for, the page shows what was indexed last.
async function showNewest() {
  const own = (running = new AbortController());
  try {
    const { images } = await get(`v1/images?limit=${part("count").value}`, own.signal);
    drawGrid(part("newest"), images, (rank) => open(images, rank, ""));
    part("newest").hidden = false;
  } catch (error) {
    if (error.name !== "AbortError") fail(error, showNewest);
  }
}

function listen() {
  part("search").onsubmit = (event) => {
    event.preventDefault();
    saveSearch();
    search();
  };
  part("file").onchange = (event) => {
    searchByFile(event.target.files[0]);
    event.target.value = "";
  };
  part("chip-remove").onclick = () => {
    setPicture(null);
    part("text").focus();
  };
  part("chip-open").onclick = () => open([picture], 0, part("text").value.trim());
  part("order").onchange = () => load();
  part("results").onkeydown = walk;
  addEventListener("popstate", loadSearch);
  addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((item) => item.type.startsWith("image/"));
    if (file) searchByFile(file);
  });
  addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target.matches("input, select") || part("picture").open) return;
    event.preventDefault();
    part("text").select();
  });
  let inside = 0; // enter and leave come for every element under the pointer
  addEventListener("dragenter", (event) => {
    if (event.dataTransfer.types.includes("Files")) part("drop").hidden = !++inside;
  });
  addEventListener("dragleave", () => (part("drop").hidden = !(inside = Math.max(0, inside - 1))));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    inside = 0;
    part("drop").hidden = true;
    if (part("picture").open) part("picture").close();
    searchByFile(event.dataTransfer.files[0]);
  });
}

async function start() {
  try {
    about = await get("v1/about");
  } catch (error) {
    fail(error, start);
    return;
  }
  part("about").textContent = `${about.images.toLocaleString("en")} pictures`;
  setUp(about, searchLike);
  listen();
  loadSearch();
}

start();
