// Elements, requests and waiting. Text from anybody comes in as text nodes alone, never as markup.

export function h(tag, attributes = {}, ...children) {
  const element = tag.startsWith("svg:") ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && typeof value !== "string" && !(element instanceof SVGElement)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export class Refused extends Error {
  constructor(status, answer) {
    super(answer.error || `the server answered ${status}`);
    this.status = status;
    this.field = answer.field;
    this.line = answer.line;
  }
}

const trouble = () => document.getElementById("trouble");

function troubled(text) {
  const place = trouble();
  if (place.textContent !== text) place.textContent = text;
  place.hidden = !text;
}

export async function ask(path, { method = "GET", body, signal } = {}) {
  const isFile = body instanceof Blob;
  const headers = { "X-Fulcrum": "page" };
  if (body !== undefined && !isFile) headers["Content-Type"] = "application/json";
  if (isFile) headers["Content-Type"] = "application/octet-stream";
  const sent = body === undefined ? (method === "GET" ? undefined : "") : isFile ? body : JSON.stringify(body);
  let response;
  try {
    response = await fetch(path, { method, headers, body: sent, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    troubled("The page’s server does not answer: it was ended. Runs go on without it. Start it again with “fulcrum ui”, and open the address it prints.");
    throw new Refused(0, { error: "the page’s server does not answer" });
  }
  if (response.status === 401) {
    const answer = await response.json();
    troubled(`Not let in: ${answer.error}.`);
    throw new Refused(401, answer);
  }
  troubled("");
  if (!response.ok) throw new Refused(response.status, await response.json().catch(() => ({})));
  return response;
}

export const get = async (path, signal) => (await ask(path, { signal })).json();
export const send = async (path, body, method = "POST") => (await ask(path, { method, body })).json();

// For whoever hears the page.
export function say(text) {
  document.getElementById("said").textContent = text;
}

// Calls `look` now and every so often until it returns true or the view is left; a server that is away, or in trouble, is asked
// again, and what it refuses is said in `place`.
export async function poll(signal, milliseconds, look, place) {
  while (!signal.aborted) {
    try {
      if (await look()) return;
    } catch (error) {
      if (error.name === "AbortError" || signal.aborted) return;
      if (!(error instanceof Refused)) throw error;
      if (error.status >= 400 && error.status < 500 && error.status !== 401) {
        place.replaceChildren(failure(error));
        return;
      }
    }
    await new Promise((done) => {
      const timer = setTimeout(done, milliseconds);
      signal.addEventListener("abort", () => { clearTimeout(timer); done(); }, { once: true });
    });
  }
}

export const number = (value, digits = 3) => (value === null || value === undefined ? "–" : Number(value).toFixed(digits));
export const count = (value) => Number(value).toLocaleString("en");
export const percent = (share) => `${(100 * share).toFixed(1).replace(/\.0$/, "")}%`;
export const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

export function bytes(value) {
  const units = ["bytes", "KB", "MB", "GB"];
  const place = value < 1000 ? 0 : Math.min(3, Math.floor(Math.log10(value) / 3));
  return `${place ? (value / 1000 ** place).toFixed(1) : value} ${units[place]}`;
}

export function clock(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

export function table(head, rows, { caption, left = [], classes = "" } = {}) {
  const isLeft = (place) => place === 0 || left.includes(place);
  return h("div", { class: "scroll", role: "region", "aria-label": caption || head[0], tabindex: "0" },
    h("table", { class: classes },
      caption && h("caption", {}, caption),
      h("thead", {}, h("tr", {}, head.map((name, place) => h("th", { scope: "col", class: isLeft(place) ? "word" : "" }, name)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell, place) =>
        h(place ? "td" : "th", { ...(place ? {} : { scope: "row" }), class: isLeft(place) ? "word" : "" }, cell)))))));
}

export const note = (kind, ...children) => h("div", { class: `say ${kind}` }, ...children);

export function failure(error) {
  return note("bad", h("p", {}, h("b", {}, "This did not work. "), error.message));
}

// A button that does something which takes time: it cannot be pressed twice, and what goes wrong is said below it.
export function action(label, work, { kind = "", id } = {}) {
  const wrong = h("div", { role: "alert" });
  let isBusy = false; // not `disabled`, which would take the focus away from whoever uses the keyboard
  const button = h("button", { type: "button", class: kind, id, onclick: async () => {
    if (isBusy) return;
    isBusy = true;
    wrong.replaceChildren();
    button.setAttribute("aria-disabled", "true");
    try {
      await work();
    } catch (error) {
      wrong.replaceChildren(failure(error));
    } finally {
      isBusy = false;
      button.removeAttribute("aria-disabled");
    }
  } }, label);
  return { button, wrong, all: h("div", { class: "action" }, button, wrong) };
}

// A command of a run with a result: begin it, watch it, show what it made.
export function command(signal, run, name, { label, again, show, about, auto = false }) {
  const path = `/api/runs/${run}/jobs/${name}`;
  const place = h("div", { class: "made" });
  const line = h("p", { class: "quiet line", role: "status" });
  const begun = action(label, async () => { await send(path); watch(); }, { id: `do-${name}` });
  const halt = action("Stop", async () => { await send(path, undefined, "DELETE"); }, { kind: "second" });
  const buttons = h("div", { class: "row" }, begun.button, halt.button);
  halt.button.hidden = true;
  const draw = (told) => {
    const isRunning = told.state === "running";
    const from = isRunning ? begun.button : halt.button, to = isRunning ? halt.button : begun.button;
    const hadFocus = document.activeElement === from;
    from.hidden = true;
    to.hidden = false;
    if (hadFocus) to.focus();
    begun.button.textContent = told.state === "none" ? label : again || label;
    begun.button.classList.toggle("second", told.state === "done" && !told.stale);
    line.classList.toggle("busy", isRunning);
    line.textContent = isRunning ? told.log.at(-1) || "beginning …" : told.state === "stopped" ? "Stopped." : told.stale ? "Settings were changed since: what follows is of the earlier ones." : "";
    line.hidden = !line.textContent;
    if (told.state === "failed") place.replaceChildren(failure({ message: told.why }));
    else if (told.state === "done") place.replaceChildren(...[show(told.result, told)].flat());
    else if (isRunning && told.result === null && place.querySelector(".bad")) place.replaceChildren();
    place.classList.toggle("stale", Boolean(told.stale) || isRunning || told.state === "stopped"); // of the settings before
  };
  const watch = () => poll(signal, 700, async () => {
    const told = await get(path, signal);
    draw(told);
    if (told.state !== "running") {
      if (told.state === "done") say(`${label}: done`);
      return true;
    }
    return false;
  }, begun.wrong);
  (async () => {
    const told = await get(path, signal).catch(() => null);
    if (!told) return;
    draw(told);
    if (told.state === "running") watch();
    else if (auto && (told.state === "none" || told.stale)) begun.button.click();
  })();
  const refresh = async () => draw(await get(path, signal));
  return { refresh, all: h("div", { class: "command" }, about && h("p", { class: "quiet" }, about), buttons, begun.wrong, halt.wrong, line, place) };
}
