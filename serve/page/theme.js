/** Light, dark, or as the system has it: `data-theme` on the root, which style.css reads. Loaded first, so that nothing flashes. */

/** @param {"system"|"light"|"dark"} theme */
export function showTheme(theme) {
  const dark = theme === "system" ? matchMedia("(prefers-color-scheme: dark)").matches : theme === "dark";
  document.documentElement.dataset.theme = dark ? "dark" : "light";
}

function stored() {
  try {
    return JSON.parse(localStorage.getItem("bumblebee.settings"))?.theme ?? "system";
  } catch {
    return "system";
  }
}

showTheme(stored());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => showTheme(stored()));
