/** Entry point: creates the components and connects them. */

import { showBanner } from "./banner.js";
import { Chat } from "./chat.js";
import { Client } from "./client.js";
import { Composer } from "./composer.js";
import { Connection } from "./connection.js";
import { isEmpty, titleOf, toJson, toMarkdown } from "./conversation.js";
import { byId, copy, download } from "./dom.js";
import { showExamples } from "./examples.js";
import { listen } from "./keyboard.js";
import { showMeter } from "./meter.js";
import { notify } from "./notices.js";
import { Settings } from "./settings.js";
import { SettingsDialog } from "./settings_dialog.js";
import { Sidebar } from "./sidebar.js";
import { browserStorage, MemoryStorage, Store } from "./store.js";
import { showTheme } from "./theme.js";
import { Thread } from "./thread.js";
import { Writer } from "./writer.js";

const CURRENT = "bumblebee.current";  // the conversation to restore on reload
const FULL = "The browser's storage is full: new messages will be lost when this page is closed. Export or delete conversations.";

const storage = browserStorage();
const settings = new Settings(storage);
const store = new Store(storage);
const connection = new Connection(new Client(document.baseURI, () => settings.key));
const chat = new Chat(store, settings, connection, (text, undo) => notify(text, undo && { label: "Undo", run: undo }));

const dialog = new SettingsDialog(settings, chat);
const helpers = { key: () => dialog.open("key"), new: () => begin(), completion: () => chat.start("completion") };
const actions = {
  regenerate: (id) => chat.regenerate(id),
  resend: (id, text) => (chat.resend(id, text), composer.focus()),
  continueAnswer: () => chat.continueAnswer(),
  help: (kind) => helpers[kind](),
};
const thread = new Thread(byId("scroller"), byId("thread"), byId("jump"), actions);
const composer = new Composer(chat, () => thread.toEnd());
const writer = new Writer(chat, actions);
const sidebar = new Sidebar(store, {
  open: (id) => (chat.open(id), focusInput()),
  rename: (id, name) => chat.rename(id, name),
  remove: (id) => chat.remove(id),
});

function draw() {
  const { conversation, running } = chat;
  const title = titleOf(conversation);
  byId("title").textContent = title;
  document.title = isEmpty(conversation) ? "Bumblebee" : `${title} – Bumblebee`;
  document.body.dataset.mode = conversation.mode;
  document.body.classList.toggle("empty", isEmpty(conversation));
  for (const radio of document.getElementsByName("mode")) radio.checked = radio.value === conversation.mode;
  byId("more").disabled = isEmpty(conversation);
  thread.show(conversation, running);
  composer.draw();
  writer.draw();
  drawList();
  drawStats();
  remember(conversation.id);
}

function drawList() {
  Object.assign(sidebar, { current: chat.conversation.id, running: new Set(chat.answers.keys()) });
  sidebar.draw();
}

function drawStats() {
  const { id, max_model_len: limit } = chat.model;
  byId("model").textContent = connection.models.length ? id : "";
  showMeter(chat.conversation, limit);
}

function progress() {
  if (!chat.running) return;
  if (chat.conversation.mode === "chat") thread.refresh();
  else writer.refresh();
  drawStats();
}

/** Kept in the session storage of this tab, not in the URL. */
function remember(id) {
  try {
    sessionStorage.setItem(CURRENT, id);
  } catch { /* storage is blocked: a reload starts a new conversation */ }
}

function remembered() {
  try {
    return sessionStorage.getItem(CURRENT) ?? "";
  } catch {
    return "";
  }
}

function focusInput() {
  if (chat.conversation.mode === "chat") composer.focus();
  else writer.area.focus();
}

function begin() {
  writer.save();
  chat.start();
  if (sidebar.over) sidebar.toggle(false);
  focusInput();
}

function save(suffix, text, type) {
  const name = titleOf(chat.conversation).replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") || "conversation";
  download(`${name}.${suffix}`, text, type);
}

function toggleTheme() {
  settings.update({ theme: document.documentElement.dataset.theme === "dark" ? "light" : "dark" });
}

/** Escape closes the drawer if it is open, otherwise it stops the answer. */
function escape() {
  if (document.querySelector(":popover-open")) return;
  if (sidebar.over) sidebar.toggle(false);
  else chat.stop();
}

function askToRename() {
  const dialog = byId("rename");
  byId("rename-name").value = titleOf(chat.conversation);
  dialog.showModal();
  byId("rename-name").select();
}

function rename(event) {
  event.preventDefault();
  chat.rename(chat.conversation.id, byId("rename-name").value.trim());
  byId("rename").close();
}

const buttons = {
  new: begin,
  "open-settings": () => dialog.open(),
  "open-shortcuts": () => byId("shortcuts").showModal(),
  "toggle-theme": toggleTheme,
  "rename-this": askToRename,
  "copy-this": async () => (await copy(toMarkdown(chat.conversation)), notify("Copied as Markdown.")),
  "export-markdown": () => save("md", toMarkdown(chat.conversation), "text/markdown"),
  "export-json": () => save("json", toJson([chat.conversation]), "application/json"),
  "delete-this": () => chat.remove(chat.conversation.id),
};
for (const [id, run] of Object.entries(buttons)) byId(id).addEventListener("click", run);
for (const button of document.querySelectorAll("#menu-of-this button")) button.addEventListener("click", () => byId("menu-of-this").hidePopover());
for (const button of document.querySelectorAll("dialog .close")) button.addEventListener("click", () => button.closest("dialog").close());
for (const radio of document.getElementsByName("mode")) radio.addEventListener("change", () => chat.start(radio.value));
byId("rename-form").addEventListener("submit", rename);

listen({
  "ctrl+shift+o": begin,
  "ctrl+k": () => sidebar.focusSearch(),
  "ctrl+b": () => sidebar.toggle(),
  "ctrl+,": () => dialog.open(),
  "ctrl+/": () => byId("shortcuts").showModal(),
  "ctrl+shift+l": toggleTheme,
  escape,
});

chat.addEventListener("change", draw);
chat.addEventListener("progress", progress);
connection.addEventListener("change", () => {
  showBanner(connection, helpers.key);
  showExamples(chat.model, (text) => composer.put(text));
  drawStats();
});
settings.addEventListener("change", () => (showTheme(settings.theme), drawStats()));
for (const source of [store, settings]) source.addEventListener("full", () => notify(FULL));
addEventListener("online", () => connection.connect());
addEventListener("pagehide", () => chat.interrupt());
addEventListener("storage", ({ key }) => {
  if (!key) return;
  settings.reload();
  store.reload(key);
  if (!chat.running && store.get(chat.conversation.id)) chat.open(chat.conversation.id);
  else drawList();
});

if (storage instanceof MemoryStorage) notify("Storage is blocked in this browser: conversations will be lost when the page is closed.");
chat.open(remembered());
focusInput();
connection.connect();
