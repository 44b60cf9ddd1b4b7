// The list of runs, and the place where a data file is dropped.

import { ask, bytes, failure, get, h, note, say, send } from "./dom.js";

const GLYPH = { planned: "○", running: "▶", stopped: "❚❚", failed: "✕", finished: "✓" };

export const badge = (state) => h("span", { class: `badge ${state}` }, h("span", { "aria-hidden": "true" }, GLYPH[state] || "·"), ` ${state}`);

// A button and a drop zone for one file; `taken` is given the uploaded data.
export function dropzone(label, hint, taken, { small = false, most = Infinity } = {}) {
  const wrong = h("div", { role: "alert" });
  const status = h("p", { class: "quiet line", role: "status", hidden: true });
  const input = h("input", { type: "file", class: "unseen", "aria-label": label, tabindex: "-1", accept: ".jsonl,.json,.csv,.parquet",
    onchange: () => { if (input.files.length) take(input.files[0]); input.value = ""; } });
  const button = h("button", { type: "button", class: small ? "second" : "", onclick: () => input.click() }, label);
  const zone = h("div", { class: small ? "drop small" : "drop" },
    small ? null : h("svg:svg", { viewBox: "0 0 48 48", "aria-hidden": "true" }, h("svg:path", { d: "M24 31V9m-9 9 9-9 9 9M8 31v8h32v-8" })),
    small ? null : h("p", { class: "big" }, "Drop a data file here, or"), button, input, hint && h("p", { class: "quiet" }, hint), status, wrong);
  const take = async (file) => {
    wrong.replaceChildren();
    try {
      await file.slice(0, 1).arrayBuffer();
    } catch {
      wrong.replaceChildren(failure({ message: `${file.name} cannot be read: it is a folder, or was moved or changed just now.` }));
      return;
    }
    if (file.size > most) {
      wrong.replaceChildren(failure({ message: `${file.name} has ${bytes(file.size)}, the page takes ${bytes(most)}; give its path to “fulcrum init” in a terminal.` }));
      return;
    }
    button.disabled = true;
    status.hidden = false;
    status.classList.add("busy");
    status.textContent = `reading ${file.name} (${bytes(file.size)}) …`;
    try {
      const response = await ask(`/api/data?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file });
      await taken(await response.json());
    } catch (error) {
      wrong.replaceChildren(failure({ message: `${file.name}: ${error.message}` }));
    } finally {
      button.disabled = false;
      status.hidden = true;
    }
  };
  let depth = 0;
  zone.addEventListener("dragenter", (event) => { event.preventDefault(); depth += 1; zone.classList.add("over"); });
  zone.addEventListener("dragleave", () => { depth -= 1; if (!depth) zone.classList.remove("over"); });
  zone.addEventListener("dragover", (event) => event.preventDefault());
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    depth = 0;
    zone.classList.remove("over");
    const { files } = event.dataTransfer;
    if (files.length > 1) wrong.replaceChildren(failure({ message: `${files.length} files: one is taken at a time.` }));
    else if (files.length) take(files[0]);
  });
  return zone;
}

const next = { planned: "task", running: "run", stopped: "run", failed: "run", finished: "result" };

export async function home(main, signal) {
  const [start, runs] = await Promise.all([get("/api/start", signal), get("/api/runs", signal)]);
  if (signal.aborted) return;
  const begin = async (found) => {
    const run = await send("/api/runs", { data: found.id, model: start.models[0] });
    location.hash = `#/run/${run.id}/data`;
  };
  const own = h("ul", { class: "runs" });
  const others = h("ul", { class: "runs" });
  const line = (run) => h("li", {},
    h("a", { href: `#/run/${run.id}/${run.set || !run.own ? next[run.state] : "data"}` }, run.title),
    badge(run.state),
    h("span", { class: "quiet when" }, [run.verb, new Date(run.made).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" })].filter(Boolean).join(" · ")),
    run.own && run.state !== "running" ? removal(run) : null,
    run.why && h("span", { class: "quiet why" }, run.why));
  const heading = h("h2", { tabindex: "-1" }, "Runs");
  const none = note("empty", h("p", {}, "No run as yet. Your first one begins with a data file."));
  let going = ""; // the id of the run that is being removed
  const removal = (run) => h("button", { type: "button", class: "second small", "aria-label": `Remove ${run.title}`, onclick: async () => {
    if (going === run.id || !confirm(`Remove “${run.title}” with everything made for it: adapters, report, exports? Uploaded files that no other run uses go with it. This cannot be undone.`)) return;
    trouble.replaceChildren();
    going = run.id;
    try {
      const told = await send(`/api/runs/${run.id}`, undefined, "DELETE");
      heading.focus(); // the button goes
      draw(await get("/api/runs", signal));
      say(`${told.removed}: removed`);
    } catch (error) {
      if (error.name !== "AbortError") trouble.replaceChildren(failure({ message: `${run.title}: ${error.message}` }));
    } finally {
      going = "";
    }
  } }, "Remove");
  const trouble = h("div", { role: "alert" });
  let drawn = "";
  const draw = (found) => {
    if (JSON.stringify(found) === drawn) return; // whoever walks the list by keyboard keeps the place
    drawn = JSON.stringify(found);
    own.replaceChildren(...found.filter((run) => run.own).map(line));
    others.replaceChildren(...found.filter((run) => !run.own).map(line));
    none.hidden = own.childElementCount > 0;
  };
  draw(runs);
  main.replaceChildren(
    h("h1", {}, "A model for your task, and what it bought"),
    h("p", { class: "quiet lead" }, "A few labelled rows, an anchor prompt and much general data become an adapter, measured against plain fine-tuning on your own rows."),
    dropzone("Choose a file", "Labelled rows as .jsonl, .json, .csv or .parquet: prompt and answer, or whole conversations. It stays on this machine.", begin, { most: start.most }),
    heading, trouble, own, none,
    ...(others.childElementCount ? [h("h2", {}, "In your folders"), others] : []),
    h("p", { class: "quiet" }, "Kept in ", h("code", {}, start.folder), ". Each run is a process of its own: it goes on when this page, or its server, is closed."));
  (async () => {
    for (;;) {
      await new Promise((done) => setTimeout(done, 3000));
      if (signal.aborted) return;
      if (runs.length) await get("/api/runs", signal).then(draw).catch(() => {});
    }
  })();
}
