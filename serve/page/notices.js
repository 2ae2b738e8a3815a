/** Toast notifications with an optional action, and announcements for screen readers. */

import { byId, element, icon } from "./dom.js";

const SHOWN = 8000;  // milliseconds; longer while hovered or focused

/**
 * @param {string} text
 * @param {{label: string, run: () => void}} [action] a button, such as "Undo"
 */
export function notify(text, action) {
  const note = element("div", { className: "note" }, element("span", {}, text));
  if (action) note.append(element("button", { type: "button", onclick: () => (note.remove(), action.run()) }, action.label));
  note.append(element("button", { type: "button", className: "quiet", aria: { label: "Dismiss" }, onclick: () => note.remove() }, icon("close")));
  const leave = () => (note.matches(":hover, :focus-within") ? setTimeout(leave, SHOWN) : note.remove());
  setTimeout(leave, SHOWN);
  byId("notes").replaceChildren(note);
}

/** Announces text to screen readers. */
export function announce(text) {
  const line = element("p", {}, text);
  byId("spoken").append(line);
  setTimeout(() => line.remove(), 30_000);
}
