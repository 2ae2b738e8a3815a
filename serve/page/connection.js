/**
 * Whether there is a server, and what it serves. Dispatches "change".
 *
 * `state` is "connecting", "ready", or the kind of the Failure that stands in the way.
 */

const PAUSE = 2000;  // milliseconds between two questions whether the server is ready
const WAITED_ON = ["loading", "offline"];

export class Connection extends EventTarget {
  /** @type {{id: string, max_model_len?: number, defaults?: Record<string, number>, examples?: string[]}[]} */
  models = [];
  state = "connecting";
  #round = 0;

  /** @param {import("./client.js").Client} client */
  constructor(client) {
    super();
    this.client = client;
  }

  /** Asks until the server is there and ready, or says something that waiting does not change. */
  async connect() {
    const round = ++this.#round;  // a newer call takes over from one that still waits
    for (;;) {
      const state = await this.#look();
      if (round !== this.#round) return;
      if (state !== this.state) this.#become(state);
      if (!WAITED_ON.includes(state)) return;
      await pause(PAUSE);
    }
  }

  /**
   * Resolves once the server takes requests.
   * @param {AbortSignal} signal
   */
  async ready(signal) {
    do await pause(PAUSE, signal); while (!(await this.client.ready()));
    if (this.state !== "ready") this.connect();
  }

  async #look() {
    try {
      const ready = await this.client.ready();  // first: a model that is ready tells more of itself
      this.models = await this.client.models();
      return ready ? "ready" : "loading";
    } catch (failure) {
      return failure.kind ?? "server";
    }
  }

  #become(state) {
    this.state = state;
    this.dispatchEvent(new Event("change"));
  }
}

/** @returns {Promise<void>} rejected when the signal aborts */
function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted();
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });
}
