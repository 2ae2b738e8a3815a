/**
 * What can go wrong between the page and the server, as one kind of error with words for the reader.
 * The server's errors have OpenAI's shape: {"error": {"message", "type", "param", "code"}}.
 */

/** @typedef {"key"|"busy"|"loading"|"offline"|"lost"|"too_long"|"no_template"|"refused"|"server"} Kind */

const KINDS = { 401: "key", 403: "key", 413: "too_long", 429: "busy", 502: "offline", 503: "loading" };
const CODES = { context_length_exceeded: "too_long", no_chat_template: "no_template" };

const WORDS = {
  key: ["The server asks for an API key", "Enter the key that its operator gave you. It is kept in this browser."],
  busy: ["The server is busy", "It has as many requests as it can take."],
  loading: ["The model is not ready", "Waiting; the question is sent as soon as the server can take it."],
  offline: ["The server cannot be reached", "Check that it runs and that this device is connected."],
  lost: ["The connection was lost", "What had arrived is kept."],
  too_long: ["The conversation is too long for the model", ""],
  no_template: ["This model has no chat template", "It continues text: use the completion mode."],
  refused: ["The server refused the request", ""],
  server: ["The server could not finish the answer", ""],
};

export class Failure extends Error {
  /**
   * @param {Kind} kind
   * @param {string} message the server's own words, or ""
   * @param {{retryAfter?: number, param?: string}} more retryAfter in seconds
   */
  constructor(kind, message = "", { retryAfter, param } = {}) {
    super(message);
    Object.assign(this, { kind, retryAfter, param });
  }

  /** What is stored with a message. */
  record() {
    return { kind: this.kind, message: this.message, retryAfter: this.retryAfter };
  }
}

/**
 * @param {Response} response one whose status is not 2xx
 * @returns {Promise<Failure>}
 */
export async function failureOf(response) {
  const { message = "", code, param } = (await response.json().catch(() => ({})))?.error ?? {};
  const kind = CODES[code] ?? KINDS[response.status] ?? (response.status < 500 ? "refused" : "server");
  return new Failure(kind, message || `HTTP ${response.status} ${response.statusText}`, {
    retryAfter: seconds(response.headers.get("retry-after")),
    param,
  });
}

/** Retry-After is a number of seconds or a date (RFC 9110, 10.2.3). */
function seconds(value) {
  if (!value) return undefined;
  const wait = /^\d+$/.test(value) ? Number(value) : (Date.parse(value) - Date.now()) / 1000;
  return Number.isFinite(wait) ? Math.max(0, Math.ceil(wait)) : undefined;
}

/**
 * @param {{kind: Kind, message: string}} failure
 * @returns {{title: string, text: string, detail: string}} `detail`: the server's own words, where they say more
 */
export function describe({ kind, message }) {
  const [title, text] = WORDS[kind] ?? WORDS.server;
  const telling = ["too_long", "refused", "server", "loading", "no_template"].includes(kind);
  return { title, text, detail: telling ? message : "" };
}
