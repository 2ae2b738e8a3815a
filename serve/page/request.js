/** Builds request bodies from conversations and settings. */

const TEXT_TOKENS = 128;  // OpenAI's default for completions, 16, is too short for a page
const STREAMED = { stream: true, stream_options: { include_usage: true } };

/**
 * An imported conversation may have a system prompt of its own, which replaces the one in the settings.
 * @param {import("./conversation.js").Message[]} messages up to the question; empty answers are omitted
 * @param {import("./settings.js").Settings} settings
 * @param {string} model
 */
export function chatRequest(messages, settings, model) {
  const hasOwn = messages.some(({ role }) => role === "system");
  const system = settings.system && !hasOwn ? [{ role: "system", content: settings.system }] : [];
  const turns = messages.filter(({ content }) => content !== "").map(({ role, content }) => ({ role, content }));
  return { model, messages: [...system, ...turns], ...settings.sampling(), ...STREAMED };
}

/**
 * @param {string} prompt
 * @param {import("./settings.js").Settings} settings
 * @param {string} model
 */
export function completionRequest(prompt, settings, model) {
  return { model, prompt, max_tokens: TEXT_TOKENS, ...settings.sampling(), ...STREAMED };
}
