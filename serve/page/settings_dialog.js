/**
 * The settings dialog. Valid changes apply immediately; an empty field uses the server's default. An invalid value is an error at
 * its field, and "Done" waits until it is corrected.
 */

import { fromJson, toJson } from "./conversation.js";
import { byId, download, element } from "./dom.js";
import { sentenceOf, showError } from "./field_error.js";
import { notify } from "./notices.js";

export class SettingsDialog {
  /**
   * @param {import("./settings.js").Settings} settings
   * @param {import("./chat.js").Chat} chat
   */
  constructor(settings, chat) {
    Object.assign(this, { settings, chat });
    this.dialog = byId("settings");
    this.form = byId("settings-form");
    this.form.addEventListener("submit", (event) => (event.preventDefault(), this.#done()));
    this.form.addEventListener("input", ({ target }) => target.ariaInvalid && showError(target));
    this.dialog.addEventListener("close", () => this.#reportUnsaved());
    this.form.addEventListener("change", ({ target }) => this.#apply(target));
    byId("reset").onclick = () => this.#reset();
    byId("export-all").onclick = () => download("bumblebee-conversations.json", toJson(chat.store.list()), "application/json");
    byId("import").onclick = () => byId("import-file").click();
    byId("import-file").onchange = ({ target }) => this.#import(target);
  }

  /** @param {string} [field] name of the field to focus */
  open(field) {
    this.#fill();
    this.dialog.showModal();
    if (field) this.form.elements[field].focus();
  }

  #fill() {
    const { models } = this.chat.connection;
    this.form.elements.model.replaceChildren(...models.map(({ id }) => element("option", { value: id }, id)));
    byId("model-row").hidden = models.length < 2;
    const { defaults = {} } = this.chat.model;
    for (const control of this.form.elements) {
      if (control.name) this.#set(control);
      if (control.name in defaults) control.placeholder = defaults[control.name];
      if (control.ariaInvalid) showError(control);
    }
  }

  get #invalid() {
    return [...this.form.elements].filter(({ validity }) => !validity.valid);
  }

  #done() {
    const [first] = this.#invalid;
    if (!first) return this.dialog.close();
    showError(first);
    first.focus();
  }

  /** Closed by Escape or its cross, with an invalid value. */
  #reportUnsaved() {
    const [first] = this.#invalid;
    if (first) notify(`Not saved: ${sentenceOf(first)}`);
  }

  #set(control) {
    const { values, theme, key } = this.settings;
    if (control.type === "radio") control.checked = control.value === theme;
    else if (control.name === "key") control.value = key;
    else if (control.name === "model") control.value = this.chat.model.id;
    else control.value = values[control.name] ?? "";
  }

  #apply(control) {
    if (!control.name || !showError(control)) return;
    if (control.name === "key") {
      this.settings.key = control.value.trim();
      this.chat.connection.connect();
    } else this.settings.update({ [control.name]: control.value });
  }

  #reset() {
    const names = new Set([...this.form.elements].filter(({ type }) => type === "number").map(({ name }) => name));
    this.settings.update({ system: "", ...Object.fromEntries([...names].map((name) => [name, ""])) });
    this.#fill();
  }

  async #import(input) {
    const [file] = input.files;
    try {
      const conversations = fromJson(await file.text());
      this.chat.add(conversations);
      this.dialog.close();
      notify(`${conversations.length} conversation${conversations.length === 1 ? "" : "s"} imported.`);
    } catch (error) {
      byId("import-error").textContent = error.message;
    }
    input.value = "";
  }
}
