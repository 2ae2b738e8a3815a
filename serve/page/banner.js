/** The line at the top that tells when the server cannot be used, and what is done about it. */

import { byId } from "./dom.js";
import { announce } from "./notices.js";

const TEXTS = {
  loading: ["The model is not ready: it is being loaded, or the server is about to stop. This page waits for it.", "Ask now"],
  offline: ["The server cannot be reached. This page keeps trying.", "Try now"],
  key: ["This server asks for an API key.", "Enter the key"],
};
const OTHER = ["The server does not answer as expected.", "Try again"];
const QUIET = ["ready", "connecting"];

/**
 * @param {import("./connection.js").Connection} connection
 * @param {() => void} askForKey
 */
export function showBanner(connection, askForKey) {
  const { state } = connection;
  const banner = byId("banner");
  if (state === "ready" && !banner.hidden) announce("The server is ready.");
  banner.hidden = QUIET.includes(state);
  const [text, label] = TEXTS[state] ?? OTHER;
  byId("banner-text").textContent = banner.hidden ? "" : text;
  const button = byId("banner-button");
  button.textContent = label;
  button.onclick = state === "key" ? askForKey : () => connection.connect();
}
