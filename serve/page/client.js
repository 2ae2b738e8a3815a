/**
 * HTTP client for OpenAI's routes and /ready. All errors are thrown as Failure, except an abort by the caller.
 */

import { Failure, failureOf } from "./failure.js";
import { events } from "./sse.js";

export class Client {
  /**
   * @param {string} base URL of the page; routes are relative to it
   * @param {() => string} key returns the API key, "" for none
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

  /** Whether the server accepts requests. A server without this route counts as ready. */
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
   * @returns {AsyncGenerator<object>} the chunks of the response
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
    throw new Failure("lost", "The stream ended before the answer was complete.");
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

/** After a stream has started, errors are sent as events. */
function checked(chunk) {
  if (chunk.error) throw new Failure("server", chunk.error.message ?? "");
  return chunk;
}
