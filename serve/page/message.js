/** A message: a system prompt or a question as plain text, or an answer as Markdown with buttons, statistics and errors. */

import { copy, element, icon, iconButton } from "./dom.js";
import { describe } from "./failure.js";
import { MarkdownView } from "./markdown.js";
import { announce } from "./notices.js";

const THINKING = /^\s*<think>([\s\S]*?)(?:<\/think>\s*|$)/;  // the reasoning before an answer
const FINISH_TEXTS = {
  length: "Cut off: the token limit was reached.",
  stopped: "Stopped.",
  interrupted: "Interrupted: the page was closed or reloaded.",
};

const SPEAKERS = { user: "You", assistant: "Bumblebee", system: "System" };
const CLASSES = { user: ["of-user", "question"], assistant: ["of-model", "prose"], system: ["of-system", "prose"] };

/**
 * Operations on a message, implemented by `Chat`.
 * @typedef {object} Actions
 * @property {(id: string) => void} regenerate
 * @property {(id: string, text: string) => void} resend
 * @property {() => void} continueAnswer
 * @property {(kind: string) => void} help action of an error's button: "key", "new", "completion"
 */

export class MessageView {
  #spoken = 0;
  #live = false;  // whether the answer was streamed while shown, and is announced to screen readers
  #ended = "";

  /**
   * @param {import("./conversation.js").Message} message
   * @param {Actions} actions
   */
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    const [owner, body] = CLASSES[message.role];
    const heading = element("h2", { className: "visually-hidden" }, SPEAKERS[message.role]);
    this.body = element("div", { className: body });
    this.ends = element("div", { className: "ends" });
    this.tools = element("div", { className: "tools" });
    this.root = element("article", { className: `message ${owner}`, dataset: { id: message.id } },
      heading, this.body, this.ends, this.tools);
    if (message.role === "assistant") this.#prepareAnswer();
    else if (message.role === "user") this.#showQuestion();
    else this.body.append(folded("System prompt", message.content));
  }

  /**
   * Renders the current state of an answer.
   * @param {{running: boolean, last: boolean}} state
   */
  update({ running, last }) {
    this.root.classList.toggle("last", last);
    if (this.message.role !== "assistant") return;
    const { message } = this;
    const thoughts = THINKING.exec(message.content);
    this.#showThoughts(thoughts, running);
    const text = thoughts ? message.content.slice(thoughts[0].length) : message.content;
    this.markdown.update(text, running);
    this.root.classList.toggle("waiting", running && message.content === "" && !message.error);
    this.root.setAttribute("aria-busy", String(running));
    this.#showEnd(running, last);
    this.#showStats(running);
    this.tools.hidden = running || message.content === "";
    this.#live ||= running;
    if (this.#live) this.#announce(running);
  }

  #showQuestion() {
    const { message, actions } = this;
    this.body.replaceChildren(message.content);
    this.tools.replaceChildren(
      copyButton("Copy message", () => message.content),
      iconButton("edit", "Edit and resend", () => this.#edit(actions)),
    );
  }

  #edit(actions) {
    const area = element("textarea", { value: this.message.content, rows: 1, aria: { label: "Edit message" } });
    const done = () => (this.#showQuestion(), this.tools.lastElementChild.focus());
    const send = (event) => (event.preventDefault(), area.value.trim() && actions.resend(this.message.id, area.value));
    const form = element("form", { className: "edit", onsubmit: send }, area,
      element("button", { type: "button", onclick: done }, "Cancel"),
      element("button", { type: "submit", className: "primary" }, "Send"));
    area.onkeydown = (event) => {
      if (event.key === "Escape") event.stopPropagation(), done();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
    };
    this.body.replaceChildren(form);
    this.tools.replaceChildren();
    area.focus();
  }

  #prepareAnswer() {
    const { message, actions } = this;
    this.thoughts = folded("Thoughts", "");
    const text = element("div", {});
    this.body.append(text);
    this.markdown = new MarkdownView(text);
    this.figures = element("span", { className: "figures" });
    this.tools.append(
      copyButton("Copy answer", () => message.content.replace(THINKING, "")),
      iconButton("again", "Regenerate", () => actions.regenerate(message.id)),
      this.figures,
    );
  }

  #showThoughts(match, running) {
    if (!match?.[1].trim()) return this.thoughts.remove();
    if (!this.thoughts.isConnected) this.body.prepend(this.thoughts);
    this.thoughts.firstChild.textContent = running && !match[0].includes("</think>") ? "Thinking…" : "Thoughts";
    this.thoughts.lastChild.textContent = match[1].trim();
  }

  /** Shows why the answer ended early, and what the user can do. */
  #showEnd(running, last) {
    const { message } = this;
    const state = JSON.stringify([running, last, message.error, message.finish]);
    if (state === this.#ended) return;
    this.#ended = state;
    const finish = running ? message.finish : (message.finish ?? "interrupted");  // stored, but the page did not see its end
    const error = finish === "interrupted" ? undefined : message.error;
    this.root.classList.toggle("failed", Boolean(error));
    if (error) return this.ends.replaceChildren(this.#errorBox(error, last, running));
    const words = running ? "" : FINISH_TEXTS[finish];
    this.ends.replaceChildren(...(words ? [element("p", {}, words), ...(last ? this.#nextStep() : [])] : []));
  }

  #errorBox(error, last, running) {
    const { title, text, detail } = describe(error);
    const box = element("div", { className: "fault", role: "alert", dataset: { kind: error.kind } }, element("strong", {}, title));
    if (detail) box.append(element("p", { className: "detail" }, detail));
    if (text) box.append(element("p", {}, text));
    if (last && !running) box.append(element("div", { className: "row" }, ...this.#remedies(error)));
    return box;
  }

  #remedies({ kind, retryAfter }) {
    const { actions, message } = this;
    const help = (label, what) => element("button", { type: "button", onclick: () => actions.help(what) }, label);
    const again = this.#againButton();
    if (retryAfter) countDown(again, retryAfter);
    const remedies = { key: [help("Enter API key", "key")], too_long: [help("New conversation", "new")], no_template: [help("Completion mode", "completion")] };
    return [...(remedies[kind] ?? []), ...(message.content ? [this.#continueButton()] : []), again];
  }

  /** For an answer that ended early without an error. One without text has no tools, and so no other way to ask again. */
  #nextStep() {
    return [this.message.content ? this.#continueButton() : this.#againButton()];
  }

  #continueButton() {
    return element("button", { type: "button", className: "continue", onclick: () => this.actions.continueAnswer() }, "Continue");
  }

  #againButton() {
    return element("button", { type: "button", onclick: () => this.actions.regenerate(this.message.id) }, "Try again");
  }

  #showStats(running) {
    const { stats = {}, model } = this.message;
    const figures = [
      model,
      stats.tokens && `${stats.tokens} tokens`,
      stats.rate && `${stats.rate.toFixed(stats.rate < 100 ? 1 : 0)} tokens/s`,
      stats.first && `first token after ${stats.first.toFixed(2)} s`,
    ];
    this.figures.textContent = running ? "" : figures.filter(Boolean).join(" · ");
  }

  /** Announces whole blocks when they are final: a screen reader that receives every token never finishes a sentence. */
  #announce(running) {
    const texts = this.markdown.finished(this.#spoken, running);
    this.#spoken += texts.length;
    texts.forEach(announce);
  }
}

function folded(title, text) {
  return element("details", { className: "folded" }, element("summary", {}, title), element("div", {}, text));
}

function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    await copy(text());
    button.replaceChildren(icon("check"));
    announce("Copied");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

/** Disables a button for some seconds. */
function countDown(button, seconds) {
  button.disabled = seconds > 0;
  button.textContent = seconds > 0 ? `Try again in ${seconds} s` : "Try again";
  if (seconds > 0) setTimeout(() => countDown(button, seconds - 1), 1000);
}
