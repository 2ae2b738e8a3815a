/** The bodies of requests, from conversations and settings. Pure functions. */

const TEXT_TOKENS = 128;  // OpenAI's own default for texts is 16, of which nobody has much
const STREAMED = { stream: true, stream_options: { include_usage: true } };

/**
 * @param {import("./conversation.js").Message[]} messages up to the question; answers without text are left out
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
