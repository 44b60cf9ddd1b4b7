// What was read of the data file: how many rows, which not and why, the first of them.

import { action, count, failure, get, h, note, poll, send, table } from "./dom.js";

const text = (messages) => messages.map((message) => (messages.length > 1 && message.role !== "user" ? `${message.role}: ${message.content}` : message.content)).join("\n");

function read(found) {
  const rows = found.rows.map((row) => [row.origin.split(":").pop(), text(row.messages.slice(0, -1)), row.messages.at(-1).content]);
  return [
    h("dl", { class: "tiles" },
      tile("rows kept", count(found.kept), found.format),
      tile("rows left out", count(found.rejected), found.rejected ? "counted by reason below" : "every row can be used"),
      tile("answers look like", found.answers, "metrics and anchor are guessed from this", true)),
    found.rejected ? [
      h("h2", {}, "Rows left out"),
      table(["reason", "rows"], Object.entries(found.reasons).sort((a, b) => b[1] - a[1]).map(([why, n]) => [why, count(n)])),
      h("details", {}, h("summary", {}, found.rejected > found.rejects.length ? `The first ${found.rejects.length}` : "Which"),
        h("ul", {}, found.rejects.map((one) => h("li", {}, `line ${one.origin.split(":").pop()}: ${one.reason}${one.detail ? ` (${one.detail})` : ""}`)))),
    ] : null,
    h("h2", {}, "The first rows"),
    table(["line", "what is asked", "answer"], rows, { left: [1, 2], classes: "texts" }),
  ].flat().filter(Boolean);
}

export const tile = (name, value, about, isWords = false) => h("div", { class: "tile" }, h("dt", {}, name), h("dd", { class: isWords ? "value words" : "value" }, value), h("dd", { class: "span" }, about));

export async function data(main, run, signal, refresh) {
  const place = h("div", {}, h("p", { class: "quiet line busy", role: "status" }, "reading the rows …"));
  const forward = h("p", { class: "forward", hidden: true }, h("a", { class: "button", href: `#/run/${run.id}/task` }, "Next: task and anchor"));
  main.append(h("h1", {}, run.title), place, forward);
  const look = () => poll(signal, 500, async () => {
    const told = await get(`/api/runs/${run.id}/jobs/init`, signal);
    if (told.state === "running") return false;
    if (told.state === "done") {
      await refresh();
      place.replaceChildren(...read(told.result));
      forward.hidden = false;
    } else if (told.state === "none") {
      place.replaceChildren(note("empty", h("p", {}, "These settings were taken over from another run.")));
      forward.hidden = !run.set;
    } else {
      place.replaceChildren(failure({ message: told.why }));
      if (/column|format/.test(told.why)) place.append(columns(run, look, place));
      else place.append(h("p", {}, h("a", { class: "button", href: "#/" }, "Choose another file")));
    }
    return true;
  }, place);
  await look();
}

// For tables whose columns have names of their own.
function columns(run, look, place) {
  const names = { prompt: h("input", { id: "column-prompt", autocomplete: "off" }), completion: h("input", { id: "column-completion", autocomplete: "off" }) };
  const go = action("Read again", async () => {
    const given = Object.fromEntries(Object.entries(names).map(([ours, input]) => [ours, input.value.trim()]).filter(([, theirs]) => theirs));
    await send(`/api/runs/${run.id}/init`, { columns: given });
    place.replaceChildren(h("p", { class: "quiet line busy", role: "status" }, "reading the rows …"));
    look();
  });
  return h("section", { class: "card" }, h("h2", {}, "Do your columns have other names?"),
    h("p", { class: "quiet" }, "Say which column is asked and which is the answer, as the file’s first line names them."),
    h("div", { class: "fields" },
      h("div", {}, h("label", { for: "column-prompt" }, "Column that is asked"), names.prompt),
      h("div", {}, h("label", { for: "column-completion" }, "Column with the answer"), names.completion)),
    h("div", { class: "row" }, go.all, h("a", { class: "button second", href: "#/" }, "Choose another file")));
}
