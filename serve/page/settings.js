/**
 * What the reader has set, in the browser's storage. A setting that is absent is the server's to decide: it is not sent.
 * The API key lies under a key of its own and is part of no export.
 */

const NUMBERS = [
  "temperature", "top_p", "top_k", "min_p", "max_tokens", "seed",
  "repetition_penalty", "presence_penalty", "frequency_penalty",
];
const PLACE = "bumblebee.settings";
const KEY_PLACE = "bumblebee.key";

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

  /** The model's id as chosen; "" for the server's first. */
  get model() {
    return this.values.model ?? "";
  }

  get key() {
    return this.storage.getItem(KEY_PLACE) ?? "";
  }

  set key(value) {
    this.#keep(KEY_PLACE, value);
  }

  /** The fields of a request that are set: numbers, under the names they have there. */
  sampling() {
    const set = NUMBERS.filter((name) => Number.isFinite(this.values[name]));
    return Object.fromEntries(set.map((name) => [name, this.values[name]]));
  }

  /**
   * @param {Record<string, string>} changes as a form gives them; "" takes a setting back
   */
  update(changes) {
    for (const [name, text] of Object.entries(changes)) {
      if (text === "") delete this.values[name];
      else this.values[name] = NUMBERS.includes(name) ? Number(text) : text;
    }
    this.#keep(PLACE, JSON.stringify(this.values));
    this.dispatchEvent(new Event("change"));
  }

  /** Takes over what another tab has set. */
  reload() {
    this.values = read(this.storage);
    this.dispatchEvent(new Event("change"));
  }

  #keep(place, text) {
    try {
      if (text) this.storage.setItem(place, text);
      else this.storage.removeItem(place);
    } catch {
      this.dispatchEvent(new Event("full"));
    }
  }
}

function read(storage) {
  try {
    return JSON.parse(storage.getItem(PLACE)) ?? {};
  } catch {
    return {};
  }
}
