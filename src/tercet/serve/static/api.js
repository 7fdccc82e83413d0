// Requests to the server, and its errors as sentences.

const KEY = "tercet-key";

export class RequestError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function send(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError(0, "The server does not answer; it may be stopped, or out of reach.");
  }
  if (response.ok) return response;
  let message = `The server answered ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Something between this page and the server answered in its own words.
  }
  throw new RequestError(response.status, message[0].toUpperCase() + message.slice(1));
}

export async function get(path, signal) {
  return (await send(path, { headers: headers(), signal })).json();
}

export async function post(path, body, signal) {
  const options = { method: "POST", body: JSON.stringify(body), signal };
  return (await send(path, { ...options, headers: { ...headers(), "content-type": "application/json" } })).json();
}

// An <img> cannot send a key, so with one the picture is fetched and shown as a blob.
export async function show(image, path) {
  image.dataset.path = path;
  image.removeAttribute("src");
  if (!sessionStorage.getItem(KEY)) {
    image.src = path;
    return;
  }
  try {
    const blob = await (await send(path, { headers: headers() })).blob();
    if (image.dataset.path !== path) return;
    image.onload = () => URL.revokeObjectURL(image.src);
    image.src = URL.createObjectURL(blob);
  } catch (error) {
    image.alt = error.message;
  }
}
