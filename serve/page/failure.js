/**
 * Errors of the connection and the server as one class, with messages for the user.
 * The server's errors have OpenAI's format: {"error": {"message", "type", "param", "code"}}.
 */

/** @typedef {"key"|"busy"|"loading"|"offline"|"lost"|"too_long"|"no_template"|"refused"|"server"} Kind */

const KINDS = { 401: "key", 403: "key", 413: "too_long", 429: "busy", 502: "offline", 503: "loading" };
const CODES = { context_length_exceeded: "too_long", no_chat_template: "no_template" };

const TEXTS = {
  key: ["The server requires an API key", "Enter the key from the operator of the server. It is stored in this browser."],
  busy: ["The server is busy", "Its request queue is full."],
  loading: ["The model is not ready", "Waiting; the message is sent as soon as the server is ready."],
  offline: ["Cannot reach the server", "Check that it is running and that this device is online."],
  lost: ["The connection was lost", "The partial answer was kept."],
  too_long: ["The conversation is too long for the model", ""],
  no_template: ["This model has no chat template", "Use the completion mode instead."],
  refused: ["The server rejected the request", ""],
  server: ["The server could not finish the answer", ""],
};

export class Failure extends Error {
  /**
   * @param {Kind} kind
   * @param {string} message the server's message, or ""
   * @param {{retryAfter?: number, param?: string}} more retryAfter in seconds
   */
  constructor(kind, message = "", { retryAfter, param } = {}) {
    super(message);
    Object.assign(this, { kind, retryAfter, param });
  }

  /** The fields that are stored with a message. */
  record() {
    return { kind: this.kind, message: this.message, retryAfter: this.retryAfter };
  }
}

/**
 * @param {Response} response with a status other than 2xx
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
 * @returns {{title: string, text: string, detail: string}} `detail`: the server's message, if it adds information
 */
export function describe({ kind, message }) {
  const [title, text] = TEXTS[kind] ?? TEXTS.server;
  const informative = ["too_long", "refused", "server", "loading", "no_template"].includes(kind);
  return { title, text, detail: informative ? message : "" };
}
