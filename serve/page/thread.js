/**
 * The messages of the current conversation. Only changed messages are rendered again, and the view scrolls with the text while
 * it is at the end.
 */

import { throttled } from "./dom.js";
import { MessageView } from "./message.js";

const NEAR = 48;  // pixels from the end that count as at the end

export class Thread {
  /** @type {Map<string, MessageView>} */
  #views = new Map();
  #conversation = null;
  #running = false;
  #atEnd = true;

  /**
   * @param {HTMLElement} scroller
   * @param {HTMLElement} list inside the scroller
   * @param {HTMLElement} jump the button that scrolls to the end
   * @param {import("./message.js").Actions} actions
   */
  constructor(scroller, list, jump, actions) {
    Object.assign(this, { scroller, list, jump, actions });
    this.refresh = throttled(() => this.#draw());
    scroller.addEventListener("scroll", () => this.#updatePosition(), { passive: true });
    new ResizeObserver(() => this.#follow()).observe(scroller);
    jump.onclick = () => this.toEnd();
  }

  /**
   * @param {import("./conversation.js").Conversation} conversation
   * @param {boolean} running whether the last message is a running answer
   */
  show(conversation, running) {
    if (conversation.id !== this.#conversation?.id) {
      this.list.replaceChildren();
      this.#views.clear();
      this.#atEnd = true;
    }
    this.#conversation = conversation;
    this.#running = running;
    this.#sync();
    this.#draw(true);
  }

  toEnd() {
    this.#atEnd = true;
    this.#follow();
  }

  #sync() {
    const { messages } = this.#conversation;
    const ids = new Set(messages.map(({ id }) => id));
    for (const [id, view] of this.#views) {
      if (ids.has(id)) continue;
      view.root.remove();
      this.#views.delete(id);
    }
    for (const message of messages) {
      const view = this.#views.get(message.id);
      if (view?.message === message) continue;
      const replacement = new MessageView(message, this.actions);
      if (view) view.root.replaceWith(replacement.root);
      else this.list.append(replacement.root);
      this.#views.set(message.id, replacement);
    }
  }

  /** During an answer only the last message changes. */
  #draw(all = false) {
    const { messages } = this.#conversation;
    const from = all ? 0 : Math.max(0, messages.length - 1);
    messages.slice(from).forEach(({ id }, index) => {
      const last = from + index === messages.length - 1;
      this.#views.get(id)?.update({ running: this.#running && last, last });
    });
    this.#follow();
  }

  #updatePosition() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    this.#atEnd = scrollHeight - scrollTop - clientHeight < NEAR;
    this.jump.hidden = this.#atEnd;
  }

  #follow() {
    if (this.#atEnd) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.#updatePosition();
  }
}
