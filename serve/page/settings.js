/**
 * The user's settings in the browser's storage. Settings that are not set are not sent, so the server's defaults apply.
 * The API key has a storage key of its own and is never exported.
 */

const NUMBERS = [
  "temperature", "top_p", "top_k", "min_p", "max_tokens", "seed",
  "repetition_penalty", "presence_penalty", "frequency_penalty",
];
const STORAGE_KEY = "bumblebee.settings";
const API_KEY_STORAGE_KEY = "bumblebee.key";

export class Settings extends EventTarget {
  /** @param {Storage} storage */
  constructor(storage) {
    super();
    this.storage = storage;
    this.values = read(storage);
  }

  /** The system prompt, "" for none. */
  get system() {
    return this.values.system ?? "";
  }

  /** "system", "light" or "dark". */
  get theme() {
    return this.values.theme ?? "system";
  }

  /** The selected model's id; "" for the server's first model. */
  get model() {
    return this.values.model ?? "";
  }

  get key() {
    return this.storage.getItem(API_KEY_STORAGE_KEY) ?? "";
  }

  set key(value) {
    this.#store(API_KEY_STORAGE_KEY, value);
  }

  /** The sampling fields of a request that are set. */
  sampling() {
    const set = NUMBERS.filter((name) => Number.isFinite(this.values[name]));
    return Object.fromEntries(set.map((name) => [name, this.values[name]]));
  }

  /**
   * @param {Record<string, string>} changes values of form fields; "" removes a setting
   */
  update(changes) {
    for (const [name, text] of Object.entries(changes)) {
      if (text === "") delete this.values[name];
      else this.values[name] = NUMBERS.includes(name) ? Number(text) : text;
    }
    this.#store(STORAGE_KEY, JSON.stringify(this.values));
    this.dispatchEvent(new Event("change"));
  }

  /** Loads changes from another tab. */
  reload() {
    this.values = read(this.storage);
    this.dispatchEvent(new Event("change"));
  }

  #store(key, text) {
    try {
      if (text) this.storage.setItem(key, text);
      else this.storage.removeItem(key);
    } catch {
      this.dispatchEvent(new Event("full"));
    }
  }
}

function read(storage) {
  try {
    return JSON.parse(storage.getItem(STORAGE_KEY)) ?? {};
  } catch {
    return {};
  }
}
