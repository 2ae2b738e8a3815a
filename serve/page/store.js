/**
 * The conversations in the browser's local storage, one key each, so that saving one never rewrites the others and two
 * tabs do not undo each other's work. Local storage holds about 5 MB; when it is full, "full" is dispatched, and what does not
 * fit stays in memory until the page is closed.
 */

/** @typedef {import("./conversation.js").Conversation} Conversation */

const PREFIX = "bumblebee.conversation.";

export class Store extends EventTarget {
  /** @type {Map<string, Conversation>} */
  #conversations = new Map();

  /** @param {Storage} storage */
  constructor(storage) {
    super();
    this.storage = storage;
    for (const key of Object.keys(storage)) this.reload(key);
  }

  /** @returns {Conversation[]} the last changed first */
  list() {
    return [...this.#conversations.values()].sort((a, b) => b.updated - a.updated);
  }

  /** @returns {Conversation | undefined} */
  get(id) {
    return this.#conversations.get(id);
  }

  /** @param {Conversation} conversation */
  save(conversation) {
    this.#conversations.set(conversation.id, conversation);
    try {
      this.storage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    } catch {
      this.dispatchEvent(new Event("full"));
    }
  }

  remove(id) {
    this.#conversations.delete(id);
    this.storage.removeItem(PREFIX + id);
  }

  /** Takes over what another tab wrote under this key; a value that cannot be read is left alone. */
  reload(key) {
    if (!key.startsWith(PREFIX)) return;
    const text = this.storage.getItem(key);
    const id = key.slice(PREFIX.length);
    try {
      if (text === null) this.#conversations.delete(id);
      else this.#conversations.set(id, JSON.parse(text));
    } catch { /* left alone */ }
  }
}

/** The browser's storage; one that forgets where the browser allows none. */
export function browserStorage() {
  try {
    localStorage.setItem("bumblebee.probe", "");
    localStorage.removeItem("bumblebee.probe");
    return localStorage;
  } catch (error) {
    return error.name === "QuotaExceededError" ? localStorage : new MemoryStorage();
  }
}

/** As much of Storage as is used here; its keys are its own properties, as a Storage's are. */
export class MemoryStorage {
  getItem(key) {
    return Object.hasOwn(this, key) ? this[key] : null;
  }

  setItem(key, value) {
    this[key] = value;
  }

  removeItem(key) {
    delete this[key];
  }
}
