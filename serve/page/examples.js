/** Example questions as buttons that fill in the message box: the server's, or generic ones. */

import { byId, element } from "./dom.js";

const GENERIC = [
  "Explain attention in three sentences.",
  "Write a Python function that reverses a list.",
  "Compare lists and tuples in a table.",
];

/**
 * @param {{examples?: string[]}} model
 * @param {(text: string) => void} put
 */
export function showExamples({ examples = GENERIC }, put) {
  const buttons = examples.map((text) => element("button", { type: "button", onclick: () => put(text) }, text));
  byId("examples").replaceChildren(...buttons);
}
