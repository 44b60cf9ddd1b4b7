// A run at work: how far it is, its losses by source, what it says; stopped and resumed.

import { action, clock, count, get, h, note, number, poll, say, send } from "./dom.js";
import { badge } from "./home.js";
import { losses } from "./chart.js";

const MEANS = {
  planned: "Not begun.", running: "At work in a process of its own. This page can be closed.", stopped: "Stopped; what was finished is kept.",
  failed: "It ended before its time.", finished: "What it made is kept.",
};

export async function watch(main, run, signal, refresh) {
  const points = new Map(); // by training
  let after = 0, state = "", told = "", newest = "", chosen = "";
  const head = h("div", { class: "status", role: "status" });
  const bars = h("div", { class: "bars" });
  const why = h("div", { role: "alert" });
  const stop = action("Stop after this step", async () => { await send(`/api/runs/${run.id}/stop`); await look(); }, { kind: "second", id: "stop" });
  const resume = action("Go on", async () => { await send(`/api/runs/${run.id}/resume`); await look(); go(); }, { id: "resume" });
  const again = action("Another run with the same settings", async () => { const made = await send(`/api/runs/${run.id}/again`); location.hash = `#/run/${made.id}/task`; }, { kind: "second" });
  const settings = h("a", { class: "button second", href: `#/run/${run.id}/task` }, "Change the settings");
  const forward = h("a", { class: "button", href: `#/run/${run.id}/result` }, "See the result");
  const picker = h("select", { id: "training", onchange: () => { chosen = picker.value; draw(); } });
  const pick = h("div", { class: "field pick" }, h("label", { for: "training" }, "Training"), picker);
  const chart = h("div", { class: "losses" });
  const log = h("pre", { tabindex: "0", "aria-label": "What the run said last" });
  main.append(h("h1", {}, run.title), head, why, bars,
    h("div", { class: "row" }, forward, resume.button, stop.button, settings, run.own ? again.button : null), stop.wrong, resume.wrong, again.wrong,
    h("section", {}, h("h2", {}, "Losses"), pick, chart),
    h("details", { open: true }, h("summary", {}, "What it says"), log));

  const progress = (label, done, all, words) => h("div", { class: "progress" },
    h("p", {}, h("b", {}, label), h("span", { class: "quiet" }, words)), h("progress", { max: all, value: done, "aria-label": label }));

  function draw() {
    pick.hidden = points.size < 2;
    const name = chosen || newest;
    if (!points.size) {
      chart.replaceChildren(note("empty", h("p", {}, state === "running" ? "No step as yet: the model is loaded and the data are read first." : state === "planned" ? "It was not begun." : "This run told no losses.")));
      return;
    }
    if (picker.options.length !== points.size) picker.replaceChildren(...[...points.keys()].map((label) => h("option", { value: label }, label)));
    picker.value = name;
    const list = points.get(name);
    chart.replaceChildren(...losses(list, list.at(-1).steps, name));
  }

  function paint(found) {
    if (found.state !== state) {
      if (state) say(`${run.title}: ${found.state}`);
      state = found.state;
      refresh();
    }
    const words = found.asked && found.state === "running" ? "Asked to stop: it finishes its step and saves." : MEANS[found.state];
    if (`${found.state}: ${words} ${found.why}` !== told) { // else whoever hears the page would be told each second
      told = `${found.state}: ${words} ${found.why}`;
      head.replaceChildren(badge(found.state), h("span", {}, words));
      why.replaceChildren(...(found.why ? [note(found.state === "failed" ? "bad" : "plain", h("p", {}, found.why))] : []));
    }
    const focused = [stop.button, resume.button].find((one) => one === document.activeElement);
    stop.button.hidden = !(run.own && found.state === "running");
    if (found.asked) stop.button.setAttribute("aria-disabled", "true");
    else stop.button.removeAttribute("aria-disabled");
    resume.button.hidden = !found.resumable;
    settings.hidden = !(run.changeable && (found.state === "failed" || found.state === "planned"));
    forward.hidden = found.state !== "finished";
    if (focused?.hidden) [resume.button, forward, stop.button].find((one) => !one.hidden)?.focus();
    const rows = [];
    if (found.state === "running") {
      if (found.overall) rows.push(progress("Whole comparison", found.overall.done, found.overall.all, `${count(found.overall.done)} of ${count(found.overall.all)} units, ${found.overall.left} left`));
      const last = newest && points.get(newest).at(-1);
      if (last) {
        const left = (last.steps - last.step) * last.seconds / last.step;
        rows.push(progress(newest, last.step, last.steps, `step ${count(last.step)} of ${count(last.steps)}${last.step < last.steps ? `, about ${clock(left)} left` : ""}, ${number(last.tokens / Math.max(last.seconds, 1e-9), 0)} tokens/s`));
      }
    }
    bars.replaceChildren(...rows);
    const isAtEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
    log.textContent = found.log.join("\n") || "nothing as yet";
    if (isAtEnd) log.scrollTop = log.scrollHeight;
  }

  async function look() {
    const found = await get(`/api/runs/${run.id}/watch?after=${after}`, signal);
    if (found.end < after) points.clear();
    after = found.end;
    for (const point of found.points) {
      if (typeof point.run !== "string") continue;
      const list = points.get(point.run) || [];
      while (list.length && list.at(-1).step >= point.step) list.pop(); // done again after a stop, with the same numbers
      list.push(point);
      points.set(point.run, list);
      newest = point.run;
    }
    const isChanged = found.points.length || found.state !== state;
    paint(found);
    if (isChanged) draw();
    return found.state !== "running" && !found.points.length;
  }
  const go = () => poll(signal, 1000, look, why);
  await look();
  go();
}
