// Up to three models of a run asked the same, side by side.

import { action, ask, failure, get, h, note, poll, send } from "./dom.js";

const MOST = 3;
const NAMES = { base: "untouched model", sft: "SFT", sft_anchor: "SFT with the anchor", tell: "TELL" };

async function* pieces(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const text = line.trim();
      if (!text.startsWith("data:")) continue;
      const body = text.slice(5).trim();
      if (body === "[DONE]") return;
      const told = JSON.parse(body);
      if (told.error) throw new Error(told.error.message || String(told.error));
      yield told.choices?.[0]?.delta?.content || "";
    }
  }
}

export function chat(run, signal) {
  const path = `/api/runs/${run.id}/chat`;
  const status = h("p", { class: "quiet line", role: "status", hidden: true });
  const wrong = h("div", { role: "alert" });
  const room = h("div", { hidden: true });
  const begin = action("Begin a chat", async () => { await send(path); look(); }, { id: "begin-chat" });
  const end = action("End the chat", async () => { await send(path, undefined, "DELETE"); look(); }, { kind: "second small" });
  let isOpen = false;

  function open(models) {
    const usual = ["base", "sft", "tell", "sft_anchor"].filter((name) => models.includes(name));
    const order = [...usual, ...models.filter((name) => !usual.includes(name))];
    const first = order.slice(0, MOST);
    let columns = [];
    const boxes = order.map((name) => h("label", {}, h("input", { type: "checkbox", value: name, checked: first.includes(name), onchange: () => arrange() }), ` ${NAMES[name] || name}`));
    const grid = h("div", { class: "talks" });
    const input = h("textarea", { id: "question", rows: "2", placeholder: "Ask what your task asks …", onkeydown: (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); go.button.click(); }
    } });
    function arrange() {
      const chosen = boxes.map((box) => box.firstChild).filter((box) => box.checked).map((box) => box.value);
      for (const box of boxes) box.firstChild.disabled = !box.firstChild.checked && chosen.length >= MOST;
      columns = chosen.map((name) => columns.find((one) => one.name === name) || { name, said: [], log: h("div", { class: "log", role: "log", "aria-label": NAMES[name] || name, tabindex: "0" }) });
      grid.className = `talks n${columns.length}`;
      grid.replaceChildren(...columns.map((one) => h("section", { class: "talk" }, h("h3", {}, NAMES[one.name] || one.name), one.log)));
    }
    const answered = async (one, question) => {
      one.said.push({ role: "user", content: question });
      const text = h("p", { class: "text" }, "…");
      one.log.append(h("p", { class: "asked" }, h("span", { class: "unseen" }, "asked: "), question), h("div", { class: "answered" }, text));
      let whole = "";
      one.log.setAttribute("aria-busy", "true"); // heard once it is whole
      try {
        for await (const piece of pieces(await ask(`${path}/ask`, { method: "POST", body: { model: one.name, messages: one.said }, signal }))) {
          whole += piece;
          text.textContent = whole;
          one.log.scrollTop = one.log.scrollHeight;
        }
        one.said.push({ role: "assistant", content: whole });
        if (!whole) text.textContent = "(an empty answer)";
      } catch (error) {
        one.said.pop();
        text.replaceWith(failure(error));
        return false;
      } finally {
        one.log.setAttribute("aria-busy", "false");
      }
      return true;
    };
    const go = action("Send", async () => {
      const question = input.value.trim();
      if (!question) { input.focus(); return; }
      input.value = "";
      const heard = await Promise.all(columns.map((one) => answered(one, question)));
      if (!heard.includes(true)) {
        input.value = question;
        await look(); // where the chat has ended, it can be begun again
      }
      input.focus();
    }, { id: "send" });
    const anew = action("Begin anew", async () => { columns = []; arrange(); input.focus(); }, { kind: "second" });
    arrange();
    room.replaceChildren(
      h("fieldset", { class: "checks" }, h("legend", {}, `Who answers (up to ${MOST})`), boxes), grid,
      h("div", { class: "field wide" }, h("label", { for: "question" }, "Your question"), input, h("p", { class: "quiet hint" }, "Enter sends, Shift+Enter begins a line. The anchor is added by itself.")),
      h("div", { class: "row" }, go.button, anew.button, end.button), go.wrong, end.wrong);
    room.hidden = false;
    isOpen = true;
  }

  const look = () => poll(signal, 1000, async () => {
    const told = await get(path, signal);
    begin.button.hidden = told.state === "starting" || told.state === "ready";
    status.hidden = told.state !== "starting";
    status.classList.toggle("busy", !status.hidden);
    status.textContent = status.hidden ? "" : `loading the models … ${told.why}`;
    wrong.replaceChildren(...(told.state === "failed" ? [failure({ message: told.why })] : []));
    if (told.state === "ready" && !isOpen) open(told.models);
    if (told.state !== "ready") { room.hidden = true; isOpen = false; }
    return told.state !== "starting";
  }, wrong);
  look();
  return h("section", {}, h("h2", {}, "Chat"), h("p", { class: "quiet" }, "The untouched model and what was trained, asked the same. The models are loaded when the chat begins and dropped when it is idle."),
    begin.all, status, wrong, room);
}
