/** Completion mode: the user and the model write one text in turns, for base models without a chat template. */

import { byId, throttled } from "./dom.js";
import { MessageView } from "./message.js";

const SAVE_AFTER = 400;  // milliseconds after the first unsaved change

export class Writer {
  #view = null;
  #unsaved = null;  // the conversation with changes that are not in the store yet
  #conversation = null;

  /**
   * @param {import("./chat.js").Chat} chat
   * @param {import("./message.js").Actions} actions
   */
  constructor(chat, actions) {
    Object.assign(this, { chat, actions });
    this.form = byId("writer");
    this.area = byId("text");
    this.refresh = throttled(() => this.draw());
    this.area.addEventListener("input", () => this.#saveSoon());
    this.area.addEventListener("keydown", (event) => this.#key(event));
    this.form.addEventListener("submit", (event) => (event.preventDefault(), this.#complete()));
    byId("stop-text").onclick = () => (chat.stop(), this.area.focus());
    byId("undo-completion").onclick = () => chat.undoCompletion();
  }

  draw() {
    const { chat, area } = this;
    const { conversation, running } = chat;
    this.form.hidden = conversation.mode !== "completion";
    this.save();
    if (this.form.hidden) return;
    if (conversation !== this.#conversation || area.value !== conversation.text) this.#write(conversation, running);
    area.readOnly = running;
    byId("complete").hidden = running;
    byId("stop-text").hidden = !running;
    byId("undo-completion").disabled = running || conversation.before === undefined;
    this.#showEnd(conversation.answer, running);
  }

  /** Saves unsaved changes. */
  save() {
    const conversation = this.#unsaved;
    this.#unsaved = null;
    if (conversation) this.chat.write(conversation, this.area.value);
  }

  #write(conversation, running) {
    const { area } = this;
    const atEnd = area.scrollHeight - area.scrollTop - area.clientHeight < 48;
    this.#conversation = conversation;
    area.value = conversation.text;
    if (running && atEnd) area.scrollTop = area.scrollHeight;
  }

  /** Shows the finish reason, error and statistics of the completion; its text is in the box. */
  #showEnd(answer, running) {
    if (this.#view?.message !== answer) {
      this.#view = answer ? new MessageView(answer, this.actions) : null;
      byId("text-end").replaceChildren(...(this.#view ? [this.#view.root] : []));
    }
    this.#view?.update({ running, last: true });
  }

  #saveSoon() {
    if (!this.#unsaved) setTimeout(() => this.save(), SAVE_AFTER);
    this.#unsaved = this.chat.conversation;
  }

  #key(event) {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    this.#complete();
  }

  #complete() {
    if (this.chat.running) return;
    this.save();
    this.chat.complete();
  }
}
