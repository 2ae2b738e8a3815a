/**
 * Conversations: data types, titles, search, export and import. No DOM.
 *
 * @typedef {object} Message
 * @property {string} id
 * @property {"user"|"assistant"|"system"} role
 * @property {string} content
 * @property {string} [model]
 * @property {string} [finish] of an answer: "stop", "length", "stopped" (by the user), "interrupted" (by leaving the page),
 *     "failed"; absent while it is streaming
 * @property {{kind: string, message: string, retryAfter?: number}} [error]
 * @property {{prompt?: number, tokens?: number, first?: number, rate?: number}} [stats] tokens; seconds; tokens per second
 *
 * @typedef {object} Conversation
 * @property {string} id
 * @property {"chat"|"completion"} mode
 * @property {string} name set by the user; "" derives the title from the text
 * @property {number} created milliseconds since 1970
 * @property {number} updated
 * @property {Message[]} messages
 * @property {string} in completion mode: the user's text and the model's continuation
 * @property {string} [before] the text before the last completion
 * @property {Message} [answer] the last completion, with its finish reason and statistics
 */

const FORMAT = "bumblebee-conversations";
const TITLE_LENGTH = 60;

/** 72 random bits; `crypto.randomUUID` is not available over plain HTTP from another machine. */
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

/** The name, or the first line after a system prompt. */
export function titleOf({ name, messages, text, mode }) {
  const line = (messages.find(({ role }) => role !== "system")?.content ?? text).trim().split("\n", 1)[0].trimEnd();
  const short = line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH - 1).trimEnd()}…` : line;
  return name || short || (mode === "chat" ? "New chat" : "New text");
}

/** Whether the title or the text contains every word of the query. */
export function matches(conversation, query) {
  const all = [conversation.name, conversation.text, ...conversation.messages.map((message) => message.content)];
  const text = all.join("\n").toLowerCase();
  return query.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}

/** @param {Conversation} conversation */
export function toMarkdown(conversation) {
  const speaker = { user: "You", assistant: "Bumblebee", system: "System" };
  const parts = conversation.messages.map(({ role, content }) => `## ${speaker[role]}\n\n${content.trim()}\n`);
  return [`# ${titleOf(conversation)}\n`, ...(conversation.text ? [conversation.text] : parts)].join("\n");
}

/** @param {Conversation[]} conversations */
export function toJson(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 2);
}

/**
 * Parses the output of `toJson`, or objects with OpenAI's "messages". Each gets a new id, so that nothing is overwritten.
 * @param {string} text
 * @returns {Conversation[]}
 * @throws {Error} with a message for the user
 */
export function fromJson(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("This file is not JSON.");
  }
  const list = Array.isArray(data) ? data : (data?.conversations ?? [data]);
  const isConversation = (value) => Array.isArray(value?.messages) || typeof value?.text === "string";
  if (!Array.isArray(list) || !list.every(isConversation)) {
    throw new Error("This file contains no conversations: expected a list of objects with “messages”.");
  }
  for (const message of list.flatMap(({ messages }) => messages ?? [])) checkMessage(message);
  return list.map(restored);
}

function checkMessage(message) {
  if (message?.role === "tool" || message?.tool_calls?.length) throw new Error("This file contains tool calls, which the page cannot show.");
  if (!["user", "assistant", "system"].includes(message?.role)) {
    throw new Error("This file contains a message whose role is not “system”, “user” or “assistant”.");
  }
  if (textOf(message.content) === null) throw new Error("This file contains a message whose content is not text.");
}

/** The text of a string or of a list of OpenAI's text parts; null for anything else, such as images. */
function textOf(content) {
  if (typeof content === "string") return content;
  const isText = (part) => part?.type === "text" && typeof part.text === "string";
  return Array.isArray(content) && content.every(isText) ? content.map(({ text }) => text).join("") : null;
}

/** Copies known fields with valid types only: the file is untrusted. */
function restored({ mode, name, created, updated, messages = [], text }) {
  const fresh = newConversation(mode === "completion" ? "completion" : "chat");
  return {
    ...fresh,
    name: typeof name === "string" ? name : "",
    created: Number.isFinite(created) ? created : fresh.created,
    updated: Number.isFinite(updated) ? updated : fresh.updated,
    messages: messages.map(({ role, content }) => ({ ...newMessage(role, textOf(content)), finish: "stop" })),
    text: typeof text === "string" ? text : "",
  };
}
