/** The banner that is shown while the server is not available. */

import { byId } from "./dom.js";
import { announce } from "./notices.js";

const TEXTS = {
  loading: ["The model is not ready: it is loading, or the server is shutting down. Waiting…", "Retry now"],
  offline: ["Cannot reach the server. Reconnecting…", "Retry now"],
  key: ["This server requires an API key.", "Enter API key"],
};
const OTHER = ["Unexpected response from the server.", "Retry"];
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
