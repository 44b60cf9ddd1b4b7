// What a finished run says: the verdict, scores, the report; then chat and export.

import { action, bytes, clock, failure, get, h, note, number, percent, poll, send, table } from "./dom.js";
import { chat } from "./chat.js";

const TO = { adapter: "Adapter (PEFT)", merged: "Merged (Transformers, vLLM)", gguf: "GGUF (llama.cpp, Ollama)", modelfile: "Adapter with a Modelfile (Ollama)" };

export async function result(main, run, signal) {
  main.append(h("h1", {}, run.title));
  if (run.state !== "finished") {
    main.append(note("empty", h("p", {}, "There is no result as yet.")), h("p", {}, h("a", { class: "button", href: `#/run/${run.id}/run` }, "To the run")));
    return;
  }
  const found = await get(`/api/runs/${run.id}/result`, signal);
  if (signal.aborted) return;
  main.append(...[
    ...found.verdicts.map((one) => h("section", { class: `verdict ${one.kind}` },
      h("p", { class: "mark-word" }, h("span", { class: "glyph", "aria-hidden": "true" }, one.glyph), one.word, found.verdicts.length > 1 ? ` · ${one.task}` : ""),
      h("p", { class: "headline" }, one.headline))),
    found.said ? h("section", { class: "verdict unknown" }, h("p", { class: "headline" }, found.said)) : null,
    h("div", { class: "row" },
      found.report ? h("a", { class: "button", href: `/runs/${run.id}/report`, target: "_blank", rel: "noopener" }, found.certificate ? "Open the certificate" : "Open the report") : null,
      found.certificate ? h("a", { class: "button second", href: `/runs/${run.id}/certificate.json` }, "certificate.json") : null,
      h("a", { class: "button second", href: `#/run/${run.id}/run` }, "Losses and log")),
    ...found.tables.map((one) => h("section", {}, h("h2", {}, one.title), table(one.head, one.rows))),
    found.notes.length ? h("div", { class: "notes" }, h("h3", {}, "To know"), h("ul", {}, found.notes.map((text) => h("li", {}, text)))) : null,
    h("p", { class: "quiet" }, "In ", h("code", {}, found.folder), found.seconds ? `, after ${clock(found.seconds)} of work.` : "."),
    found.arms.length ? chat(run, signal) : null,
    found.arms.length ? exporting(run, found.arms, signal) : null,
  ].filter(Boolean));
}

function exporting(run, arms, signal) {
  const to = h("select", { id: "to", onchange: () => { bits.hidden = to.value !== "gguf"; } }, Object.entries(TO).map(([value, label]) => h("option", { value }, label)));
  const arm = h("select", { id: "arm" }, arms.map((name) => h("option", { value: name }, name)));
  const quantization = h("select", { id: "bits" }, ["q8_0", "f16"].map((value) => h("option", { value }, value)));
  const bits = h("div", { class: "field", hidden: true }, h("label", { for: "bits" }, "Precision"), quantization);
  if (arms.includes("tell")) arm.value = "tell";
  const list = h("ul", { class: "exports" });
  let drawn = "";
  const look = () => poll(signal, 1500, async () => {
    const found = await get(`/api/runs/${run.id}/exports`, signal);
    if (JSON.stringify(found) !== drawn) list.replaceChildren(...found.map((one) => shipped(run, one))); // else focus would go
    drawn = JSON.stringify(found);
    return !found.some((one) => one.state === "running");
  }, go.wrong);
  const go = action("Export", async () => {
    await send(`/api/runs/${run.id}/exports`, { to: to.value, arm: arm.value, quantization: quantization.value });
    look();
  }, { id: "export" });
  look();
  return h("section", {}, h("h2", {}, "Export"),
    h("p", { class: "quiet" }, "What is written is scored again as other programs load it; where it is not the adapter that was trained, nothing is left."),
    h("div", { class: "fields" }, h("div", { class: "field" }, h("label", { for: "to" }, "As"), to), h("div", { class: "field" }, h("label", { for: "arm" }, "Arm"), arm), bits),
    go.all, list);
}

function shipped(run, one) {
  const [, arm, kind, precision] = one.name.match(/^export-([^-]*)-([^-]*)-?(.*)$/);
  const title = h("b", {}, `${arm}: ${TO[kind]}${precision ? `, ${precision}` : ""}`);
  if (one.state === "running") {
    const halt = action("Stop", () => send(`/api/runs/${run.id}/jobs/${one.name}`, undefined, "DELETE"), { kind: "second small" });
    return h("li", { class: "card" }, title, h("p", { class: "quiet line busy", role: "status" }, one.log.at(-1) || "beginning …"), halt.all);
  }
  if (one.state !== "done") return h("li", { class: "card" }, title, failure({ message: one.why }));
  const check = one.result.check;
  const size = one.files.reduce((sum, file) => sum + file.size, 0);
  return h("li", { class: "card" }, title,
    check ? h("p", {}, "✓ Scored again by ", check.reader, `: ${number(check.nats[1])} nats per answer token, ${number(check.nats[0])} as trained; likeliest tokens agree in ${percent(check.agreement)}.`) : h("p", {}, "Not scored again."),
    h("p", {}, h("a", { class: "button second", href: `/runs/${run.id}/exports/${one.name}.zip` }, `Download (${bytes(size)})`)),
    h("p", { class: "quiet" }, "In ", h("code", {}, one.folder)));
}
