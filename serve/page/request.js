/** Builds request bodies from conversations and settings. */

const TEXT_TOKENS = 128;  // OpenAI's default for completions, 16, is too short for a page
const STREAMED = { stream: true, stream_options: { include_usage: true } };

/**
 * @param {import("./conversation.js").Message[]} messages up to the question; empty answers are omitted
 * @param {import("./settings.js").Settings} settings
 * @param {string} model
 */
export function chatRequest(messages, settings, model) {
  const system = settings.system ? [{ role: "system", content: settings.system }] : [];
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
