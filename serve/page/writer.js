/** Completion: one text, which the reader and the model write in turns. For base models, which know no roles. */

import { byId, throttled } from "./dom.js";
import { MessageView } from "./message.js";

const SAVE_AFTER = 400;  // milliseconds after the first unsaved key

export class Writer {
  #view = null;
  #unsaved = null;  // the conversation whose text has changed in the box and not yet in the store
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
    byId("take-back").onclick = () => chat.takeBack();
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
    byId("take-back").disabled = running || conversation.before === undefined;
    this.#showEnd(conversation.answer, running);
  }

  /** Writes down what is only in the box so far. */
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

  /** Of the answer the text is above; its end, its error and its figures are here. */
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
