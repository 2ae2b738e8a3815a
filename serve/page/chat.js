/**
 * What a reader does with conversations: ask, stop, ask again, edit, continue, rename, delete. It knows the store, the settings
 * and the connection, and nothing of the page, which listens: "change" when a conversation or the list is another, "progress"
 * when an answer has grown. Answers go on while another conversation is shown.
 */

import { Answer } from "./answer.js";
import { isEmpty, newConversation, newMessage, titleOf } from "./conversation.js";
import { chatRequest, completionRequest } from "./request.js";

const SAVE_EVERY = 1000;  // milliseconds, while an answer comes
const GO_ON = "Please continue exactly where you stopped.";

export class Chat extends EventTarget {
  /** @type {Map<string, Answer>} the answers on their way, by conversation */
  answers = new Map();

  /**
   * @param {import("./store.js").Store} store
   * @param {import("./settings.js").Settings} settings
   * @param {import("./connection.js").Connection} connection
   * @param {(text: string, undo?: () => void) => void} tell what has been done, and how to undo it
   */
  constructor(store, settings, connection, tell) {
    super();
    Object.assign(this, { store, settings, connection, tell });
    this.conversation = newConversation();
  }

  /** Whether the conversation that is shown has an answer on its way. */
  get running() {
    return this.answers.has(this.conversation.id);
  }

  /** The model that will be asked: the chosen one, while the server has it. */
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

  /** Answers a question anew; what came after it goes. */
  regenerate(id) {
    if (this.conversation.mode === "completion") return this.#completeAgain();
    const index = this.#indexOf(id);
    if (index < 0) return;
    this.#cut(index, "The answer was replaced.");
    this.#answer();
  }

  /** Replaces a question and answers it; what came after it goes. */
  resend(id, text) {
    const index = this.#indexOf(id);
    if (index < 0) return;
    this.#cut(index, "The question was replaced.");
    this.send(text);
  }

  /** Asks for the rest of an answer that was cut off. */
  goOn() {
    if (this.conversation.mode === "completion") this.complete();
    else this.send(GO_ON);
  }

  /** Lets the model write on after the text of a completion. */
  complete() {
    const { conversation } = this;
    if (this.running) return;
    conversation.before = conversation.text;
    conversation.answer = newMessage("assistant");
    this.#run(conversation, conversation.answer, completionRequest(conversation.text, this.settings, this.model.id));
  }

  /** Gives back the text as it was before the model wrote on. */
  takeBack() {
    const { conversation } = this;
    if (this.running || conversation.before === undefined) return;
    conversation.text = conversation.before;
    delete conversation.before;
    delete conversation.answer;
    this.#save(conversation);
  }

  /** The text of a completion, as the reader has changed it. */
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
    this.tell(`“${titleOf(conversation)}” was deleted.`, () => {
      this.store.save(conversation);
      this.open(id);
    });
  }

  /** @param {import("./conversation.js").Conversation[]} conversations */
  add(conversations) {
    for (const each of conversations) this.store.save(each);
    if (conversations.length) this.open(conversations[0].id);
  }

  /** Writes down what is on its way: the page is about to close. */
  keep() {
    for (const id of this.answers.keys()) if (this.store.get(id)) this.store.save(this.store.get(id));
  }

  #indexOf(id) {
    return this.running ? -1 : this.conversation.messages.findIndex((message) => message.id === id);
  }

  /** Drops messages from `index` on, in a way that can be undone. */
  #cut(index, text) {
    const { conversation } = this;
    const before = conversation.messages;
    conversation.messages = before.slice(0, index);
    this.tell(text, () => {
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
    this.takeBack();
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
