/**
 * A streaming answer: sends the request, appends the text to a message as it arrives, measures time, and can be stopped.
 * Dispatches "change" on every update.
 */

import { Failure } from "./failure.js";

const MIN_CHUNKS = 5;  // for a rate
const MIN_SECONDS = 0.25;  // for a rate: text that a proxy or the network held back arrives at once
const SETTLE = 250;  // milliseconds
const ROUTES = { chat: "v1/chat/completions", completion: "v1/completions" };

const LOST = new Set(["lost", "offline"]);

export class Answer extends EventTarget {
  #abort = new AbortController();
  #clock = { sent: 0, first: 0, last: 0, chunks: 0 };

  /**
   * @param {import("./connection.js").Connection} connection
   * @param {import("./conversation.js").Message} message receives the text, finish reason, error and statistics
   */
  constructor(connection, message) {
    super();
    this.connection = connection;
    this.message = message;
  }

  /** Aborts the request, which also cancels it at the server. The text so far is kept. */
  stop() {
    this.#abort.abort();
  }

  /** Ends the answer because the page is about to close. */
  interrupt() {
    delete this.message.error;
    this.message.finish = "interrupted";
    this.#abort.abort();
  }

  /**
   * Resolves when the answer has ended. Errors are stored in the message.
   * @param {"chat"|"completion"} mode
   * @param {object} body
   */
  async run(mode, body) {
    const { message } = this;
    delete message.finish;
    try {
      while (!(await this.#attempt(mode, body))) await this.connection.ready(this.#abort.signal);
      message.finish ??= "stop";
    } catch (error) {
      // Some browsers abort a page's requests before `pagehide` when the user leaves it: the connection was not lost then.
      if (LOST.has(error.kind)) await new Promise((resolve) => setTimeout(resolve, SETTLE));
      this.#end(error);
    }
    this.dispatchEvent(new Event("change"));
  }

  /** @returns {Promise<boolean>} false if the server is not ready and the request should be retried */
  async #attempt(mode, body) {
    delete this.message.error;
    this.#clock = { sent: performance.now(), first: 0, last: 0, chunks: 0 };
    try {
      for await (const chunk of this.connection.client.stream(ROUTES[mode], body, this.#abort.signal)) this.#take(chunk);
      return true;
    } catch (error) {
      if (error.kind !== "loading") throw error;
      this.message.error = error.record();
      this.dispatchEvent(new Event("change"));
      return false;
    }
  }

  #take({ model, choices: [choice] = [], usage }) {
    const { message } = this;
    if (model) message.model = model;
    const text = choice?.delta?.content ?? choice?.text ?? "";
    if (text) this.#count();
    message.content += text;
    if (choice?.finish_reason) message.finish = choice.finish_reason;
    message.stats = this.#stats(usage);
    this.dispatchEvent(new Event("change"));
  }

  #count() {
    this.#clock.last = performance.now();
    this.#clock.first ||= this.#clock.last;
    this.#clock.chunks += 1;
  }

  /** Counts chunks as tokens until the usage arrives with the last chunk. */
  #stats(usage) {
    const { sent, first, chunks } = this.#clock;
    const tokens = usage?.completion_tokens ?? chunks;
    return { prompt: usage?.prompt_tokens, tokens, first: first ? (first - sent) / 1000 : undefined, rate: this.#rate(tokens) };
  }

  /** Tokens per second after the first chunk; undefined if there were too few chunks or too little time to measure it. */
  #rate(tokens) {
    const { first, last, chunks } = this.#clock;
    const seconds = (last - first) / 1000;
    if (chunks < MIN_CHUNKS || seconds < MIN_SECONDS) return undefined;
    return (tokens * (chunks - 1)) / chunks / seconds;
  }

  #end(error) {
    const { message } = this;
    if (this.#abort.signal.aborted) {
      delete message.error;
      message.finish ??= "stopped";
      return;
    }
    message.finish = "failed";
    message.error = (error instanceof Failure ? error : new Failure("server", error.message)).record();
  }
}
