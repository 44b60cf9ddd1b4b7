// The settings: a form beside the file that it writes, the anchors that can be measured, and what will be trained.

import { action, command, failure, get, h, note, number, say, send, table } from "./dom.js";
import { dropzone } from "./home.js";

const PLACEMENTS = {
  user_prefix: "before the user’s text", user_suffix: "after the user’s text", system: "as the system text", response_prefix: "as the answer’s beginning",
};

export async function task(main, run, signal) {
  const start = await get("/api/start", signal);
  if (signal.aborted) return;
  main.append(h("h1", {}, "Task and anchor"));
  if (!run.set) {
    main.append(note("empty", h("p", {}, "There are no settings as yet: the data come first.")), h("p", {}, h("a", { class: "button", href: `#/run/${run.id}/data` }, "To the data")));
    return;
  }
  const form = settings(run, start, signal, () => { seen.refresh(); });
  const seen = command(signal, run.id, "check", { label: "See what will be trained", again: "Look again", show: rows, auto: run.changeable });
  const anchors = command(signal, run.id, "anchors", {
    label: "Propose and score anchors", again: "Propose and score again",
    about: "Some are filled from your rows, some written by the model; all are scored on the model as it is, and nothing is trained. This takes minutes on a small machine.",
    show: (scores) => proposals(scores[0], run.changeable, form),
  });
  main.append(...[
    run.changeable ? null : note("plain", h("p", {}, "This run was begun, so its settings stand. ", h("b", {}, "Another run with the same settings"), " can be made from its page.")),
    form.all,
    run.changeable && h("section", {}, h("h2", {}, "Anchors, proposed and measured"), anchors.all),
    h("section", {}, h("h2", {}, "What will be trained"), seen.all),
    h("p", { class: "forward" }, h("a", { class: "button", href: `#/run/${run.id}/plan`, onclick: form.leave }, "Next: the plan")),
  ].filter(Boolean));
}

export function legend() {
  const kinds = { prompt: "read, not trained", anchor: "the anchor", trained: "trained", end: "end of the answer, trained" };
  return h("p", { class: "legend" }, Object.entries(kinds).map(([kind, words]) => [h("span", { class: `span ${kind}` }, words), " "]));
}

export function rows(found) {
  return [
    legend(),
    h("ul", { class: "seen" }, found.rows.map((row) => h("li", { class: "card" },
      h("p", { class: "quiet" }, h("b", {}, row.source), ` row ${row.origin.split(":").pop()}`),
      h("p", { class: "text" }, row.spans.map(([kind, text]) => h("span", { class: `span ${kind}`, title: kind }, text)))))),
    table(["source", "rows", "median tokens", "longest"], found.tokens.map((one) => [one.source, one.rows, one.median, one.longest]), { caption: "Tokens a row" }),
    Object.keys(found.left_out).length ? h("details", {}, h("summary", {}, "Rows that are not used"),
      table(["reason", "rows"], Object.entries(found.left_out))) : null,
  ].filter(Boolean);
}

function proposals(scores, isOpen, form) {
  const best = [...scores.scores].sort((a, b) => a.loss - b.loss);
  const rows = best.map((one) => {
    const isControl = one.source.startsWith("control");
    const use = isOpen && !isControl ? h("button", { type: "button", class: "second small", onclick: () => form.anchor(one.text, one.placement), "aria-label": `Use the anchor: ${one.text}` }, "Use") : "";
    return [h("span", {}, one.chosen ? h("b", { class: "picked" }, "→ ") : "", one.text || "(none)"), isControl ? "control" : one.source, number(one.loss), use];
  });
  return [
    table(["anchor", "by", "loss ↓", ""], rows, { classes: "anchors texts", left: [1], caption: `Scored on ${scores.rows} training rows` }),
    h("p", { class: "quiet" }, "→ is what `auto` would choose: the anchor with the lowest loss before training, in nats per answer token. A low loss before training need not mean a low one after it."),
  ];
}

// A number where it is one; else what was written, which the server says something about.
const numeric = (text) => (text === "" || Number.isNaN(Number(text)) ? text : Number(text));

function settings(run, start, signal, changed) {
  const isFixed = !run.changeable;
  const saved = h("p", { class: "quiet line", role: "status", hidden: true });
  const fields = new Map();
  let values = run.values;
  const text = h("textarea", { id: "yaml", rows: "24", spellcheck: "false", readOnly: isFixed, "aria-describedby": "yaml-wrong" }, run.text);
  const wrongText = h("div", { id: "yaml-wrong", role: "alert" });
  const unknown = h("div", { role: "alert" });
  const unsaved = h("p", { class: "quiet", role: "status", hidden: true }, "The form waits until these changes are saved or dropped.");
  let known = run.text, waiting = Promise.resolve();

  // While the file is being written by hand the form stands still, so that neither undoes the other.
  const edited = (isEdited) => {
    unsaved.hidden = drop.button.hidden = !isEdited;
    for (const { box } of fields.values()) for (const control of box.querySelectorAll("input, select, textarea")) control.disabled = isFixed || isEdited;
  };
  const drop = action("Drop the changes", async () => { text.value = known; wrongText.replaceChildren(); edited(false); }, { kind: "second", id: "drop-yaml" });
  drop.button.hidden = true;
  text.addEventListener("input", () => edited(text.value !== known));

  // Fields take what was saved, but for the one that is being written in, and those with a mistake that was not part of it.
  const refill = (changes) => {
    for (const field of fields.values()) {
      const isWrong = field.box.classList.contains("wrong") && changes && !field.names.some((name) => name in changes);
      if (isWrong || (changes && field.box.contains(document.activeElement))) continue;
      field.fill(values);
    }
  };
  const apply = (found, changes) => {
    const isText = !changes;
    values = found.values;
    known = found.text;
    if (isText || unsaved.hidden) text.value = known; // else it is being written while an earlier change was saved
    for (const field of fields.values()) {
      if (!isText && !field.names.some((name) => name in changes)) continue;
      field.wrong.replaceChildren();
      field.box.classList.remove("wrong");
    }
    refill(changes);
    if (isText) edited(false);
    wrongText.replaceChildren();
    unknown.replaceChildren();
    saved.hidden = false;
    saved.textContent = isText ? "The file is saved." : "Saved.";
    say(saved.textContent);
    changed();
  };
  const put = (changes, from) => { waiting = waiting.then(() => change(changes, from)); return waiting; }; // one after another
  const change = async (changes, from) => {
    try {
      apply(await send(`/api/runs/${run.id}/settings`, { changes }, "PUT"), changes);
    } catch (error) {
      saved.hidden = true;
      const field = [...fields.values()].find((one) => error.field && one.names.some((name) => error.field === name || error.field.startsWith(`${name}.`) || error.field.startsWith(`${name}[`))) || fields.get(from);
      if (!field) unknown.replaceChildren(failure(error));
      else {
        field.box.classList.add("wrong");
        field.wrong.replaceChildren(h("p", {}, error.message.replace(/^[\w.[\]]+: /, "")));
      }
    }
  };
  const field = (name, label, control, { hint, names = [name], fill, wide = false }) => {
    const id = `f-${name.replaceAll(".", "-")}`;
    const wrong = h("div", { class: "wrong-text", id: `${id}-wrong`, role: "alert" });
    const isGroup = control.tagName === "FIELDSET";
    if (!isGroup) { control.id = id; control.setAttribute("aria-describedby", `${id}-hint ${id}-wrong`); control.disabled = isFixed; } else for (const box of control.querySelectorAll("input")) box.disabled = isFixed;
    const box = h("div", { class: wide ? "field wide" : "field" }, isGroup ? null : h("label", { for: id }, label), control, hint && h("p", { class: "quiet hint", id: `${id}-hint` }, hint), wrong);
    fields.set(name, { box, wrong, fill, names });
    fill(values);
    return box;
  };
  const choice = (options, onchange) => h("select", { onchange }, options.map(([value, label]) => h("option", { value }, label)));
  const own = (found) => found.tasks[0];

  const model = h("input", { list: "models", autocomplete: "off", spellcheck: "false", onchange: () => put({ model: model.value.trim() }, "model") });
  const anchor = h("textarea", { rows: "3", onchange: () => putAnchor() });
  const placement = choice(Object.entries(PLACEMENTS), () => putAnchor());
  const putAnchor = () => put({ "task.anchor": anchor.value.trim() ? { text: anchor.value.trim(), placement: placement.value } : null }, "task.anchor");

  const uploads = () => start.data.filter((one) => one.id !== run.data_id);
  const pool = choice([], () => put(pool.value === "none" ? { general: [], "mix.general_per_task": 0 } : { general: [{ path: pool.value }], ...(values.mix.general_per_task === 0 ? { "mix.general_per_task": 4 } : {}) }, "general"));
  const test = choice([], () => put({ "task.test": test.value || null }, "task.test"));
  const fillFiles = () => {
    const files = uploads().map((one) => [one.path, one.name]);
    const set = (control, first) => {
      control.replaceChildren(...[...first, ...files].map(([value, label]) => h("option", { value }, label)));
    };
    set(pool, [["builtin", "the packaged pool"], ["none", "none: plain fine-tuning"]]);
    set(test, [["", "a part of the rows, held out"]]);
  };
  fillFiles();
  const added = (control) => async (found) => {
    start.data = [found, ...start.data];
    fillFiles();
    refill({});
    control.value = found.path;
    control.dispatchEvent(new Event("change"));
  };
  const select = (control, value, label) => {
    if (![...control.options].some((option) => option.value === value)) control.append(h("option", { value }, label || value));
    control.value = value;
  };
  const perTask = h("input", { inputmode: "decimal", autocomplete: "off", onchange: () => put({ "mix.general_per_task": numeric(perTask.value.trim()) }, "mix.general_per_task") });
  const repeats = choice([["auto", "auto: 1, 2, 4 and 8 are tried"], ...["1", "2", "4", "8", "16"].map((n) => [n, n])], () => put({ "mix.repeats": repeats.value === "auto" ? "auto" : Number(repeats.value) }, "mix.repeats"));
  const longest = h("input", { type: "number", min: "1", step: "1", onchange: () => put({ "task.max_new_tokens": numeric(longest.value) }, "task.max_new_tokens") });
  const metrics = h("fieldset", { class: "checks" }, h("legend", {}, "Metrics"), start.metrics.map((name) => h("label", {}, h("input", { type: "checkbox", value: name, onchange: () => {
    const chosen = [...metrics.querySelectorAll("input:checked")].map((box) => box.value);
    put({ "task.metrics": [...own(values).metrics.filter((known) => chosen.includes(known)), ...chosen.filter((known) => !own(values).metrics.includes(known))] }, "task.metrics");
  } }), ` ${name}`)));

  const left = h("div", { class: "form" },
    h("datalist", { id: "models" }, start.models.map((name) => h("option", { value: name }))),
    field("model", "Model", model, { hint: "A built-in name, a hub id such as org/name, or a folder that the page was started with.", fill: (v) => { model.value = v.model; }, wide: true }),
    field("task.anchor", "Anchor", anchor, { hint: "Text that every row of your task carries and no general row. Say in your own words what the task is; empty means none.", fill: (v) => { anchor.value = own(v).anchor ? own(v).anchor.text : ""; }, wide: true }),
    field("task.anchor.placement", "Where the anchor stands", placement, { fill: (v) => { placement.value = own(v).anchor ? own(v).anchor.placement : "user_prefix"; } }),
    field("mix.repeats", "How often each row is shown", repeats, { fill: (v) => select(repeats, String(v.mix.repeats)) }),
    h("div", { class: "field" },
      field("general", "General data", pool, { hint: "Rows that keep, and teach, what is not special about your task.", fill: (v) => select(pool, v.general.length ? v.general[0].path : "none", v.general.length > 1 ? `${v.general.length} sources (see the file)` : undefined), wide: true }),
      isFixed ? null : dropzone("Add a file of general rows", "", added(pool), { small: true, most: start.most })),
    field("mix.general_per_task", "General rows for each task row shown", perTask, { hint: "0 is plain fine-tuning; auto lets a pilot choose.", fill: (v) => { perTask.value = v.mix.general_per_task; } }),
    h("div", { class: "field" },
      field("task.test", "Test rows", test, { hint: "Scored once, at the end.", fill: (v) => select(test, own(v).test.length ? own(v).test[0].path : ""), wide: true }),
      isFixed ? null : dropzone("Add a file of test rows", "", added(test), { small: true, most: start.most })),
    field("task.max_new_tokens", "Longest answer, in tokens", longest, { fill: (v) => { longest.value = own(v).max_new_tokens; } }),
    field("task.metrics", "Metrics", metrics, { fill: (v) => { for (const box of metrics.querySelectorAll("input")) box.checked = own(v).metrics.includes(box.value); }, wide: true }));
  const keep = action("Save the file", async () => {
    try {
      await waiting;
      apply(await send(`/api/runs/${run.id}/settings`, { text: text.value }, "PUT"), null);
    } catch (error) {
      saved.hidden = true;
      wrongText.replaceChildren(failure(error));
      if (error.line) {
        const lines = text.value.split("\n");
        const from = lines.slice(0, error.line - 1).join("\n").length + (error.line > 1 ? 1 : 0);
        text.focus();
        text.setSelectionRange(from, from + (lines[error.line - 1] || "").length);
      }
    }
  }, { kind: "second", id: "save-yaml" });
  const right = h("details", { class: "file", open: innerWidth > 900 }, h("summary", {}, "The settings file"),
    h("p", { class: "quiet" }, "What the form writes; every setting can be set here. The form rewrites it without comments."),
    h("label", { for: "yaml", class: "unseen" }, "Settings as YAML"), text, wrongText, unsaved, isFixed ? null : h("div", { class: "row" }, keep.all, drop.all));
  return {
    all: h("div", { class: "settings" }, h("div", {}, left, unknown, saved), right),
    leave: (event) => {
      if (unsaved.hidden) return;
      event.preventDefault();
      text.focus();
      say(unsaved.textContent);
    },
    anchor: (chosen, where) => {
      put({ "task.anchor": { text: chosen, placement: where } }, "task.anchor");
      anchor.scrollIntoView({ block: "center" });
      anchor.focus();
    },
  };
}
