/**
 * Parser for server-sent events.
 * The format: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
 * Only `data` lines are used; event names, ids, retry times and comments (keep-alives) are ignored.
 */

/** Splits text that arrives in chunks of any size into events. */
export class EventSplitter {
  #rest = "";
  #data = [];

  /**
   * @param {string} text the next chunk
   * @returns {string[]} the data of each complete event
   */
  push(text) {
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/);  // a last \r may be half of a \r\n
    this.#rest = lines.pop();
    return lines.flatMap((line) => this.#parse(line));
  }

  #parse(line) {
    if (line === "") {
      const data = this.#data.splice(0);
      return data.length ? [data.join("\n")] : [];
    }
    const [, value] = /^data: ?(.*)$/s.exec(line) ?? [];
    if (value !== undefined) this.#data.push(value);
    return [];
  }
}

/**
 * @param {ReadableStream<Uint8Array>} stream
 * @returns {AsyncGenerator<string>} the data of each event; leaving the loop cancels the stream
 */
export async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  const splitter = new EventSplitter();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* splitter.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
