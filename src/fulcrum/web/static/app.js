// Which view is shown, by the part of the address after #; every name in it is an id that the server looks up.

import { get, h, note, say } from "./dom.js";
import { home } from "./home.js";
import { data } from "./data.js";
import { task } from "./task.js";
import { plan } from "./plan.js";
import { watch } from "./watch.js";
import { result } from "./result.js";

const STEPS = [
  ["data", "Data", data], ["task", "Task & anchor", task], ["plan", "Plan", plan], ["run", "Run", watch], ["result", "Result", result],
];
let leaving = new AbortController();
let isFirst = true;

function steps(run, current) {
  const place = document.getElementById("steps");
  place.hidden = !run;
  if (!run) return;
  const isOpen = { data: run.own, task: run.own && run.set, plan: run.own && run.set, run: run.state !== "planned", result: run.state === "finished" };
  const here = STEPS.findIndex(([name]) => name === current);
  place.replaceChildren(h("ol", {}, STEPS.map(([name, label], k) => {
    const text = [h("span", { class: "dot", "aria-hidden": "true" }, k < here && isOpen[name] ? "✓" : String(k + 1)), h("span", { class: "label" }, label)];
    const open = isOpen[name] && name !== current;
    return h("li", { class: k < here ? "past" : "", "aria-current": name === current ? "step" : null },
      open ? h("a", { href: `#/run/${run.id}/${name}` }, text) : h("span", { class: "closed" }, text));
  })));
}

async function show() {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const main = document.getElementById("main");
  const [, kind, id, step = "data"] = location.hash.split("/");
  try {
    if (kind !== "run") {
      steps(null);
      await home(main, signal);
    } else {
      const run = await get(`/api/runs/${id}`, signal);
      if (signal.aborted) return;
      const known = STEPS.find(([name]) => name === step) || STEPS[0];
      steps(run, known[0]);
      main.replaceChildren();
      await known[2](main, run, signal, () => refresh(id, known[0]));
    }
  } catch (error) {
    if (error.name === "AbortError" || signal.aborted) return;
    main.replaceChildren(h("h1", {}, "Not here"), note("bad", h("p", {}, error.message)), h("p", {}, h("a", { href: "#/" }, "All runs")));
  }
  const title = main.querySelector("h1");
  document.title = title ? `${title.textContent} · Fulcrum` : "Fulcrum";
  if (title && !isFirst) {
    title.tabIndex = -1;
    title.focus({ preventScroll: true });
    scrollTo(0, 0);
    say(title.textContent);
  }
  isFirst = false;
}

async function refresh(id, step) {
  const run = await get(`/api/runs/${id}`).catch(() => null);
  if (!run) return run;
  if (location.hash.startsWith(`#/run/${id}/`)) steps(run, step);
  return run;
}

addEventListener("hashchange", show);
for (const kind of ["dragover", "drop"]) addEventListener(kind, (event) => event.preventDefault()); // beside a zone: stay here
document.querySelector(".jump").addEventListener("click", (event) => {
  event.preventDefault();
  document.getElementById("main").focus();
});
show();
