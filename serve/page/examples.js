/** Questions to begin with, each a button that puts it into the box: the server's own, or some that suit any model. */

import { byId, element } from "./dom.js";

const GENERAL = [
  "Explain attention in three sentences.",
  "Write a Python function that reverses a list.",
  "Compare lists and tuples in a table.",
];

/**
 * @param {{examples?: string[]}} model
 * @param {(text: string) => void} put
 */
export function showExamples({ examples = GENERAL }, put) {
  const buttons = examples.map((text) => element("button", { type: "button", onclick: () => put(text) }, text));
  byId("examples").replaceChildren(...buttons);
}
