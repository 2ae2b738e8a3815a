/** The message box: grows with its text, Enter sends, and the button stops a running answer. */

import { byId } from "./dom.js";

export class Composer {
  /**
   * @param {import("./chat.js").Chat} chat
   * @param {() => void} sent called after a message was sent
   */
  constructor(chat, sent) {
    Object.assign(this, { chat, sent });
    this.form = byId("composer");
    this.area = byId("question");
    this.area.addEventListener("input", () => this.#grow());
    this.area.addEventListener("keydown", (event) => this.#key(event));
    this.form.addEventListener("submit", (event) => (event.preventDefault(), this.#submit()));
    byId("stop").onclick = () => (chat.stop(), this.focus());
  }

  /** Shows the send or the stop button. */
  draw() {
    const { running, conversation } = this.chat;
    const stopHadFocus = document.activeElement === byId("stop");
    this.form.hidden = conversation.mode !== "chat";
    byId("send").hidden = running;
    byId("stop").hidden = !running;
    if (!running && stopHadFocus) this.focus();
  }

  focus() {
    this.area.focus();
  }

  /** Fills in a text, to be edited or sent. */
  put(text) {
    this.area.value = text;
    this.#grow();
    this.focus();
  }

  #key(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;  // Enter confirms a word in an input method
    event.preventDefault();
    this.#submit();
  }

  #submit() {
    const text = this.area.value;
    if (!text.trim() || this.chat.running) return;
    this.area.value = "";
    this.#grow();
    this.chat.send(text);
    this.sent();
  }

  #grow() {
    this.area.style.height = "auto";
    this.area.style.height = `${this.area.scrollHeight}px`;
  }
}
