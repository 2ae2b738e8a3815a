/**
 * Stores conversations in the browser's local storage under one key each, so that saving one does not rewrite the others and
 * two tabs do not overwrite each other. Local storage holds about 5 MB; when it is full, "full" is dispatched, and new data
 * stays in memory until the page is closed.
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

  /** @returns {Conversation[]} last modified first */
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

  /** Loads a key that another tab has changed; invalid values are ignored. */
  reload(key) {
    if (!key.startsWith(PREFIX)) return;
    const text = this.storage.getItem(key);
    const id = key.slice(PREFIX.length);
    try {
      if (text === null) this.#conversations.delete(id);
      else this.#conversations.set(id, JSON.parse(text));
    } catch { /* invalid */ }
  }
}

/** The browser's local storage, or an in-memory one if it is blocked. */
export function browserStorage() {
  try {
    localStorage.setItem("bumblebee.probe", "");
    localStorage.removeItem("bumblebee.probe");
    return localStorage;
  } catch (error) {
    return error.name === "QuotaExceededError" ? localStorage : new MemoryStorage();
  }
}

/** The subset of Storage used here; as in Storage, keys are own properties. */
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
