/**
 * A conversation: what it is, its title, and its way into files and back. Plain data, no browser needed.
 *
 * @typedef {object} Message
 * @property {string} id
 * @property {"user"|"assistant"} role
 * @property {string} content
 * @property {string} [model]
 * @property {string} [finish] of an answer: "stop", "length", "stopped" (by the reader), "failed"; absent while it comes
 * @property {{kind: string, message: string, retryAfter?: number}} [error]
 * @property {{prompt?: number, tokens?: number, first?: number, rate?: number}} [stats] tokens; seconds; tokens per second
 *
 * @typedef {object} Conversation
 * @property {string} id
 * @property {"chat"|"completion"} mode
 * @property {string} name given by the reader; "" takes the title from the text
 * @property {number} created milliseconds since 1970
 * @property {number} updated
 * @property {Message[]} messages
 * @property {string} text of a completion: what was written, and what the model wrote on
 * @property {string} [before] the text before the model wrote on the last time
 * @property {Message} [answer] what it wrote on then, with its end and its figures
 */

const FORMAT = "bumblebee-conversations";
const TITLE_LENGTH = 60;

/** 72 random bits: `crypto.randomUUID` is missing where the page comes over plain HTTP from another machine. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(9)), (byte) => byte.toString(36).padStart(2, "0")).join("");
}

/** @returns {Conversation} */
export function newConversation(mode = "chat") {
  const now = Date.now();
  return { id: newId(), mode, name: "", created: now, updated: now, messages: [], text: "" };
}

/** @returns {Message} */
export function newMessage(role, content = "") {
  return { id: newId(), role, content };
}

/** @param {Conversation} conversation */
export function isEmpty({ messages, text }) {
  return messages.length === 0 && text === "";
}

/** The reader's name for it, or its first line. */
export function titleOf({ name, messages, text, mode }) {
  const line = (messages[0]?.content ?? text).trim().split("\n", 1)[0].trimEnd();
  const short = line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH - 1).trimEnd()}…` : line;
  return name || short || (mode === "chat" ? "New chat" : "New text");
}

/** Whether every word of the query is somewhere in the title or the text. */
export function matches(conversation, query) {
  const all = [conversation.name, conversation.text, ...conversation.messages.map((message) => message.content)];
  const text = all.join("\n").toLowerCase();
  return query.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}

/** @param {Conversation} conversation */
export function toMarkdown(conversation) {
  const speaker = { user: "You", assistant: "Bumblebee" };
  const parts = conversation.messages.map(({ role, content }) => `## ${speaker[role]}\n\n${content.trim()}\n`);
  return [`# ${titleOf(conversation)}\n`, ...(conversation.text ? [conversation.text] : parts)].join("\n");
}

/** @param {Conversation[]} conversations */
export function toJson(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 2);
}

/**
 * Reads what `toJson` wrote, or objects with OpenAI's "messages". Each gets a new id, so that nothing is overwritten.
 * @param {string} text
 * @returns {Conversation[]}
 * @throws {Error} whose message says what is wrong with the file
 */
export function fromJson(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("This file is not JSON.");
  }
  const list = Array.isArray(data) ? data : (data?.conversations ?? [data]);
  if (!Array.isArray(list) || !list.every(isConversation)) {
    throw new Error("This file holds no conversations: a list of objects with “messages” was expected.");
  }
  return list.map(restored);
}

function isConversation(value) {
  const fine = (message) => ["user", "assistant", "system"].includes(message?.role) && typeof message.content === "string";
  return Array.isArray(value?.messages) ? value.messages.every(fine) : typeof value?.text === "string";
}

/** Only the fields known here, of the types they must have: a file may come from anybody. */
function restored({ mode, name, created, updated, messages = [], text }) {
  const fresh = newConversation(mode === "completion" ? "completion" : "chat");
  return {
    ...fresh,
    name: typeof name === "string" ? name : "",
    created: Number.isFinite(created) ? created : fresh.created,
    updated: Number.isFinite(updated) ? updated : fresh.updated,
    messages: messages.filter(({ role }) => role !== "system").map(({ role, content }) => ({ ...newMessage(role, content), finish: "stop" })),
    text: typeof text === "string" ? text : "",
  };
}
