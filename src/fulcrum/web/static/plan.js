// What a run will be made of and about how long it takes; then it is begun.

import { action, clock, command, count, h, note, percent, plural, send, table } from "./dom.js";

function bar(name, share) {
  const filled = h("span", { class: "filled" });
  filled.style.width = `${Math.max(100 * share, 0.6)}%`;
  return h("div", { class: "share" }, h("span", { class: "name" }, name), h("span", { class: "whole", "aria-hidden": "true" }, filled), h("span", { class: "value" }, percent(share)));
}

function shares(found) {
  const trainings = found.trainings;
  if (!trainings.length) return [note("plain", h("p", {}, "Nothing will be trained."))];
  const longest = trainings.at(-1).share;
  const warnings = [...new Set([...found.notes, ...trainings.flatMap((one) => one.warnings)])];
  return [
    h("div", { class: "card" },
      h("p", {}, h("b", {}, "Your rows’ part of the stream"), h("span", { class: "quiet" }, trainings.length > 1 ? `, of the longest of ${trainings.length} trials` : "")),
      bar("of the examples", longest.examples), bar("of the tokens", longest.tokens), bar("of the tokens trained on", longest.loss_tokens)),
    table(["arm", "repeats", "task rows shown", "general rows", "examples", "tokens", "loss tokens", "tokens in all", "steps"],
      trainings.map((one) => [one.arm, one.repeats, count(one.share.task_examples), count(one.share.general_examples), percent(one.share.examples), percent(one.share.tokens), percent(one.share.loss_tokens), count(one.share.total_tokens), count(one.steps)]),
      { caption: trainings.length > 1 ? "Trials; dev rows choose among them" : "The training" }),
    warnings.length ? h("div", { class: "notes" }, h("h3", {}, "To know"), h("ul", {}, warnings.map((text) => h("li", {}, text)))) : null,
  ].filter(Boolean);
}

function cost(found) {
  return found.expected.map((one) => h("p", { class: "estimate" }, h("b", {}, one.verb === "train" ? "One adapter: " : "Comparison: "),
    one.seconds === null ? `cannot be said: ${one.why_not}` : `about ${clock(one.seconds)}, ${plural(one.trainings, "training")}`)).concat(
    h("p", { class: "quiet" }, "An estimate, measured on a few of these rows on this machine as it was just now."));
}

const VERBS = [
  ["train", "Train one adapter", "Scored beside the untouched model. Says nothing of what plain fine-tuning would have given."],
  ["quick", "A quick comparison", "About 10 minutes: a first answer to whether general data helps your task."],
  ["compare", "The whole comparison", "Every arm on the same rows, with intervals and a certificate. Takes long; a budget limits its time."],
];

export async function plan(main, run, signal) {
  main.append(h("h1", {}, "The plan"));
  const seen = command(signal, run.id, "check", { label: "Work out the plan", again: "Work it out again", show: shares, auto: run.changeable });
  const timed = command(signal, run.id, "minutes", { label: "Measure how long it takes", again: "Measure again", show: cost, about: "Speed is measured on a few rows, which takes about a minute." });
  const minutes = h("input", { id: "minutes", type: "number", min: "1", step: "1", placeholder: "no limit" });
  const budget = h("div", { class: "field budget", hidden: true }, h("label", { for: "minutes" }, "Budget in minutes"), minutes);
  const radios = VERBS.map(([verb, label, about], k) => h("label", { class: "verb card" },
    h("input", { type: "radio", name: "verb", value: verb, checked: k === 0, onchange: () => { budget.hidden = verb !== "compare"; } }), h("span", {}, h("b", {}, label), h("span", { class: "quiet" }, about))));
  const chosen = () => main.querySelector("input[name=verb]:checked").value;
  const go = action("Start", async () => {
    const verb = chosen();
    await send(`/api/runs/${run.id}/begin`, { verb, minutes: verb === "compare" && minutes.value ? Number(minutes.value) : null });
    location.hash = `#/run/${run.id}/run`;
  }, { id: "start" });
  main.append(
    h("section", {}, h("h2", {}, "Shares"), seen.all),
    h("section", {}, h("h2", {}, "Cost"), timed.all),
    h("section", {}, h("h2", {}, "Start"),
      run.changeable ? [
        h("fieldset", { class: "verbs" }, h("legend", { class: "unseen" }, "What to do"), radios),
        budget,
        go.all,
      ] : note("plain", h("p", {}, "This run was begun. ", h("a", { href: `#/run/${run.id}/run` }, "See how it goes")))));
}
