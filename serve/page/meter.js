/** Shows how much of the model's context a conversation uses. */

import { byId } from "./dom.js";

const FULL = 0.9;  // share from which the meter warns
const number = new Intl.NumberFormat("en");

/**
 * @param {import("./conversation.js").Conversation} conversation
 * @returns {number} tokens of the last request with usage and its answer, plus those of later answers
 */
export function tokensOf({ messages, answer }) {
  const answers = (answer ? [answer] : messages).filter(({ stats }) => stats);
  const known = answers.findLast(({ stats }) => stats.prompt !== undefined);
  const later = answers.slice(answers.indexOf(known) + 1);
  const total = known ? known.stats.prompt + known.stats.tokens : 0;
  return later.reduce((sum, { stats }) => sum + (stats.tokens ?? 0), total);
}

/**
 * @param {import("./conversation.js").Conversation} conversation
 * @param {number} [limit] the model's context in tokens
 */
export function showMeter(conversation, limit) {
  const used = tokensOf(conversation);
  const meter = byId("meter");
  meter.hidden = used === 0;
  const share = limit ? Math.min(1, used / limit) : 0;
  byId("meter-bar").hidden = !limit;
  byId("meter-fill").style.width = `${100 * share}%`;
  meter.classList.toggle("nearly-full", share >= FULL);
  byId("meter-text").textContent = limit ? `${number.format(used)} of ${number.format(limit)} tokens` : `${number.format(used)} tokens`;
}
