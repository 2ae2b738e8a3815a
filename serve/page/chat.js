/**
 * The user's operations on conversations: send, stop, regenerate, edit, continue, rename, delete. Uses the store, the settings
 * and the connection, but not the DOM. Dispatches "change" when a conversation or the list has changed, and "progress" when
 * an answer has grown. Answers continue in the background while another conversation is shown.
 */

import { Answer } from "./answer.js";
import { isEmpty, newConversation, newMessage, titleOf } from "./conversation.js";
import { chatRequest, completionRequest } from "./request.js";

const SAVE_EVERY = 1000;  // milliseconds, during an answer
const CONTINUE_PROMPT = "Please continue exactly where you stopped.";

export class Chat extends EventTarget {
  /** @type {Map<string, Answer>} running answers by conversation id */
  answers = new Map();

  /**
   * @param {import("./store.js").Store} store
   * @param {import("./settings.js").Settings} settings
   * @param {import("./connection.js").Connection} connection
   * @param {(text: string, undo?: () => void) => void} notify shows what has been done, and an undo action
   */
  constructor(store, settings, connection, notify) {
    super();
    Object.assign(this, { store, settings, connection, notify });
    this.conversation = newConversation();
  }

  /** Whether the current conversation has a running answer. */
  get running() {
    return this.answers.has(this.conversation.id);
  }

  /** The selected model if the server has it, otherwise its first one. */
  get model() {
    const { models } = this.connection;
    return models.find(({ id }) => id === this.settings.model) ?? models[0] ?? { id: "bumblebee" };
  }

  /** @param {string} id */
  open(id) {
    this.conversation = this.store.get(id) ?? newConversation();
    this.#changed();
  }

  /** @param {"chat"|"completion"} mode */
  start(mode = this.conversation.mode) {
    if (!isEmpty(this.conversation) || this.conversation.mode !== mode) this.conversation = newConversation(mode);
    this.#changed();
  }

  /** @param {string} text */
  send(text) {
    if (!text.trim() || this.running) return;
    this.conversation.messages.push(newMessage("user", text));
    this.#answer();
  }

  /** Regenerates an answer; later messages are removed. */
  regenerate(id) {
    if (this.conversation.mode === "completion") return this.#completeAgain();
    const index = this.#indexOf(id);
    if (index < 0) return;
    this.#cut(index, "Answer replaced.");
    this.#answer();
  }

  /** Replaces a question and sends it; later messages are removed. */
  resend(id, text) {
    const index = this.#indexOf(id);
    if (index < 0) return;
    this.#cut(index, "Message replaced.");
    this.send(text);
  }

  /** Continues an answer that was cut off. */
  continueAnswer() {
    this.send(CONTINUE_PROMPT);
  }

  /** Lets the model continue the text, in completion mode. */
  complete() {
    const { conversation } = this;
    if (this.running) return;
    conversation.before = conversation.text;
    conversation.answer = newMessage("assistant");
    this.#run(conversation, conversation.answer, completionRequest(conversation.text, this.settings, this.model.id));
  }

  /** Restores the text before the last completion. */
  undoCompletion() {
    const { conversation } = this;
    if (this.running || conversation.before === undefined) return;
    conversation.text = conversation.before;
    delete conversation.before;
    delete conversation.answer;
    this.#save(conversation);
  }

  /** Saves the edited text, in completion mode. */
  write(conversation, text) {
    conversation.text = text;
    this.#save(conversation);
  }

  stop(id = this.conversation.id) {
    this.answers.get(id)?.stop();
  }

  rename(id, name) {
    const conversation = this.store.get(id);
    if (!conversation) return;
    conversation.name = name;
    this.#save(conversation);
  }

  remove(id) {
    const conversation = this.store.get(id);
    if (!conversation) return;
    this.stop(id);
    this.store.remove(id);
    if (id === this.conversation.id) this.conversation = newConversation(conversation.mode);
    this.#changed();
    this.notify(`Deleted “${titleOf(conversation)}”.`, () => {
      this.store.save(conversation);
      this.open(id);
    });
  }

  /** @param {import("./conversation.js").Conversation[]} conversations */
  add(conversations) {
    for (const conversation of conversations) this.store.save(conversation);
    if (conversations.length) this.open(conversations[0].id);
  }

  /** Ends and saves running answers; called when the page is about to close. */
  interrupt() {
    for (const [id, answer] of this.answers) {
      answer.interrupt();
      if (this.store.get(id)) this.store.save(this.store.get(id));
    }
  }

  #indexOf(id) {
    return this.running ? -1 : this.conversation.messages.findIndex((message) => message.id === id);
  }

  /** Removes the messages from `index` on, and offers to undo it. */
  #cut(index, text) {
    const { conversation } = this;
    const before = conversation.messages;
    conversation.messages = before.slice(0, index);
    this.notify(text, () => {
      this.stop(conversation.id);
      conversation.messages = before;
      this.#save(conversation);
    });
  }

  #answer() {
    const { conversation } = this;
    const body = chatRequest(conversation.messages, this.settings, this.model.id);
    const message = newMessage("assistant");
    conversation.messages.push(message);
    this.#run(conversation, message, body);
  }

  #completeAgain() {
    this.undoCompletion();
    this.complete();
  }

  async #run(conversation, message, body) {
    const answer = new Answer(this.connection, message);
    let saved = 0;
    answer.addEventListener("change", () => {
      if (conversation.mode === "completion") conversation.text = conversation.before + message.content;
      if (performance.now() - saved > SAVE_EVERY && this.store.get(conversation.id)) {
        saved = performance.now();
        this.store.save(conversation);
      }
      this.dispatchEvent(new Event("progress"));
    });
    this.answers.set(conversation.id, answer);
    conversation.updated = Date.now();
    this.#save(conversation);
    await answer.run(conversation.mode, body);
    this.answers.delete(conversation.id);
    if (this.store.get(conversation.id) === conversation) this.#save(conversation);
    if (message.error?.kind === "offline") this.connection.connect();
  }

  #save(conversation) {
    this.store.save(conversation);
    this.#changed();
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}
