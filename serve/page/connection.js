/**
 * The state of the server, and its models. Dispatches "change".
 *
 * `state` is "connecting", "ready", or the kind of the Failure.
 */

const PAUSE = 2000;  // milliseconds between two readiness checks
const RETRIED = ["loading", "offline"];

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

  /** Polls until the server is ready, or until it returns an error that is not temporary. */
  async connect() {
    const round = ++this.#round;  // a newer call replaces an older one that is still waiting
    for (;;) {
      const state = await this.#check();
      if (round !== this.#round) return;
      if (state !== this.state) this.#setState(state);
      if (!RETRIED.includes(state)) return;
      await pause(PAUSE);
    }
  }

  /**
   * Resolves when the server accepts requests.
   * @param {AbortSignal} signal
   */
  async ready(signal) {
    do await pause(PAUSE, signal); while (!(await this.client.ready()));
    if (this.state !== "ready") this.connect();
  }

  async #check() {
    try {
      const ready = await this.client.ready();  // first, because the model card has more fields once the model is ready
      this.models = await this.client.models();
      return ready ? "ready" : "loading";
    } catch (failure) {
      return failure.kind ?? "server";
    }
  }

  #setState(state) {
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
