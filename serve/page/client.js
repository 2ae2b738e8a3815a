/**
 * The server's HTTP interface: OpenAI's routes, and /ready. Every error leaves here as a Failure, but for an abort,
 * which the caller asked for.
 */

import { Failure, failureOf } from "./failure.js";
import { events } from "./sse.js";

export class Client {
  /**
   * @param {string} base the address of the page, which the routes are relative to
   * @param {() => string} key gives the API key, "" for none
   */
  constructor(base, key) {
    this.base = base;
    this.key = key;
  }

  /** @returns {Promise<{id: string, max_model_len?: number, defaults?: Record<string, number>, examples?: string[]}[]>} */
  async models() {
    const response = await this.#fetch("v1/models");
    return (await response.json()).data;
  }

  /** Whether the server takes requests. A server without this route is taken to be ready. */
  async ready() {
    try {
      await this.#fetch("ready", { cache: "no-store" });
      return true;
    } catch (failure) {
      return !["loading", "offline"].includes(failure.kind);
    }
  }

  /**
   * @param {string} path "v1/chat/completions" or "v1/completions"
   * @param {object} body
   * @param {AbortSignal} signal
   * @returns {AsyncGenerator<object>} the chunks of the answer
   */
  async *stream(path, body, signal) {
    const response = await this.#fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
    try {
      for await (const data of events(response.body)) {
        if (data === "[DONE]") return;
        yield checked(JSON.parse(data));
      }
    } catch (error) {
      throw signal.aborted || error instanceof Failure ? error : new Failure("lost", error.message);
    }
    throw new Failure("lost", "The stream ended before the answer did.");
  }

  async #fetch(path, options = {}) {
    const key = this.key();
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    let response;
    try {
      response = await fetch(new URL(path, this.base), { ...options, headers });
    } catch (error) {
      throw options.signal?.aborted ? error : new Failure("offline", error.message);
    }
    if (!response.ok) throw await failureOf(response);
    return response;
  }
}

/** A stream that has begun can tell of an error only in an event. */
function checked(chunk) {
  if (chunk.error) throw new Failure("server", chunk.error.message ?? "");
  return chunk;
}
