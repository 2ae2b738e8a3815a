/** The conversation list: search, open, rename, delete. On a phone it is a drawer. */

import { matches, titleOf } from "./conversation.js";
import { byId, element, icon, iconButton } from "./dom.js";

const DAY = 86_400_000;
const NARROW = matchMedia("(max-width: 50rem)");

/**
 * @typedef {object} ListActions
 * @property {(id: string) => void} open
 * @property {(id: string, name: string) => void} rename
 * @property {(id: string) => void} remove
 */

export class Sidebar {
  #renaming = "";

  /**
   * @param {import("./store.js").Store} store
   * @param {ListActions} actions
   */
  constructor(store, actions) {
    Object.assign(this, { store, actions, current: "", running: new Set() });
    this.root = byId("sidebar");
    this.list = byId("conversations");
    this.search = byId("search");
    this.search.addEventListener("input", () => this.draw());
    byId("menu").onclick = () => this.toggle();
    byId("shade").onclick = () => this.toggle(false);
    byId("close-sidebar").onclick = () => this.toggle(false);
    NARROW.addEventListener("change", () => this.toggle(!NARROW.matches));
    this.toggle(!NARROW.matches);
  }

  get open() {
    return !this.root.inert;
  }

  /** Whether it covers the conversation, as on a phone. */
  get over() {
    return NARROW.matches && this.open;
  }

  /** @param {boolean} open */
  toggle(open = !this.open) {
    const [menu, hadFocus] = [byId("menu"), this.root.contains(document.activeElement)];
    this.root.inert = !open;
    document.body.classList.toggle("with-sidebar", open);
    menu.setAttribute("aria-expanded", String(open));
    byId("main").inert = this.over;
    if (this.over) byId("close-sidebar").focus();
    else if (hadFocus && !open) menu.focus();
  }

  focusSearch() {
    this.toggle(true);
    this.search.focus();
    this.search.select();
  }

  /** Draws the list, with the `current` conversation and the `running` ones marked. */
  draw() {
    if (this.#renaming) return;
    const query = this.search.value.trim();
    const results = this.store.list().filter((conversation) => matches(conversation, query));
    const focused = this.#focused();
    this.list.replaceChildren(...grouped(results).flatMap(([name, group]) => [
      element("li", { className: "group" }, element("h2", {}, name), element("ul", {}, ...group.map((conversation) => this.#item(conversation)))),
    ]));
    byId("no-results").hidden = results.length > 0;
    byId("no-results").textContent = query ? "No results." : "No conversations yet.";
    if (focused) this.list.querySelector(focused)?.focus();
  }

  /** A selector of the focused element in the list. */
  #focused() {
    const active = document.activeElement;
    const item = this.list.contains(active) && active.closest("[data-id]");
    return item ? `[data-id="${item.dataset.id}"] .${active.dataset.part}` : "";
  }

  #item(conversation) {
    const { id } = conversation;
    const title = titleOf(conversation);
    const part = (name) => ({ dataset: { part: name } });
    const open = element("button", { type: "button", className: "title open", title, onclick: () => this.#open(id), ...part("open") },
      ...(conversation.mode === "completion" ? [icon("text")] : []), element("span", {}, title));
    if (id === this.current) open.setAttribute("aria-current", "true");
    const item = element("li", { className: "item", dataset: { id } }, open);
    if (this.running.has(id)) item.append(element("span", { className: "dot", role: "img", aria: { label: "answering" } }));
    open.addEventListener("keydown", ({ key }) => {
      if (key === "F2") this.#rename(item, title);
      else if (key === "Delete") this.actions.remove(id);
    });
    item.append(
      iconButton("edit", `Rename “${title}”`, () => this.#rename(item, title), { className: "quiet rename", ...part("rename") }),
      iconButton("trash", `Delete “${title}”`, () => this.actions.remove(id), { className: "quiet delete", ...part("delete") }),
    );
    return item;
  }

  #open(id) {
    if (this.over) this.toggle(false);
    this.actions.open(id);
  }

  #rename(item, title) {
    const { id } = item.dataset;
    this.#renaming = id;
    const input = element("input", { value: title, className: "renaming", aria: { label: "Conversation name" } });
    const end = (name) => {
      if (!this.#renaming) return;  // removing the field also blurs it
      this.#renaming = "";
      if (name !== undefined && name !== title) this.actions.rename(id, name);
      this.draw();
      this.list.querySelector(`[data-id="${id}"] .open`)?.focus();
    };
    input.onkeydown = (event) => {
      if (event.key === "Escape") event.stopPropagation(), end();
      else if (event.key === "Enter" && !event.isComposing) end(input.value.trim());
    };
    input.onblur = () => end(input.value.trim());
    item.replaceChildren(input);
    input.select();
    input.focus();
  }
}

/** @returns {[string, import("./conversation.js").Conversation[]][]} grouped by the day of the last change */
function grouped(conversations) {
  const today = new Date().setHours(0, 0, 0, 0);
  const bounds = [[today, "Today"], [today - DAY, "Yesterday"], [today - 7 * DAY, "Previous 7 days"], [-Infinity, "Older"]];
  const groups = new Map(bounds.map(([, name]) => [name, []]));
  for (const conversation of conversations) {
    groups.get(bounds.find(([since]) => conversation.updated >= since)[1]).push(conversation);
  }
  return [...groups].filter(([, group]) => group.length);
}
