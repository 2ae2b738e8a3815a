/** Global keyboard shortcuts, listed in a dialog of index.html. None is a single letter, which would interfere with typing. */

/**
 * @param {Record<string, () => void>} actions by shortcut, such as "ctrl+k"; Ctrl also matches Command on a Mac
 */
export function listen(actions) {
  document.addEventListener("keydown", (event) => {
    const name = nameOf(event);
    if (!actions[name] || event.defaultPrevented) return;
    if (document.querySelector("dialog[open]")) return;  // Escape closes the dialog; other shortcuts are disabled
    if (name !== "escape") event.preventDefault();
    actions[name]();
  });
}

function nameOf({ key, ctrlKey, metaKey, shiftKey, altKey }) {
  const held = [(ctrlKey || metaKey) && "ctrl", altKey && "alt", shiftKey && "shift"];
  return [...held.filter(Boolean), key.toLowerCase()].join("+");
}
