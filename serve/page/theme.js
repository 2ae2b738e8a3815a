/** Sets `data-theme` on the root for style.css: light, dark, or the system's. Loaded first, to avoid a flash. */

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
