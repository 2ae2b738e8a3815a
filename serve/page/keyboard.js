/** Shortcuts of the whole page; the dialog in index.html lists them. None is a lone letter, which would be in the way of typing. */

/**
 * @param {Record<string, () => void>} actions by shortcut, "ctrl+k" for example; Ctrl is Command on a Mac
 */
export function listen(actions) {
  document.addEventListener("keydown", (event) => {
    const name = nameOf(event);
    if (!actions[name] || event.defaultPrevented) return;
    if (document.querySelector("dialog[open]")) return;  // Escape closes it, the rest can wait
    if (name !== "escape") event.preventDefault();
    actions[name]();
  });
}

function nameOf({ key, ctrlKey, metaKey, shiftKey, altKey }) {
  const held = [(ctrlKey || metaKey) && "ctrl", altKey && "alt", shiftKey && "shift"];
  return [...held.filter(Boolean), key.toLowerCase()].join("+");
}
