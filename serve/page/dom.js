/** DOM helpers. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * @param {string} tag
 * @param {object} properties set on the element; `dataset` and `aria` are nested objects
 * @param {...(Node|string)} children
 */
export function element(tag, { dataset = {}, aria = {}, ...properties } = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  Object.assign(node.dataset, dataset);
  for (const [name, value] of Object.entries(aria)) node.setAttribute(`aria-${name}`, value);
  node.append(...children);
  return node;
}

/** An icon from the SVG symbols at the top of index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/**
 * @param {string} name of the icon
 * @param {string} label tooltip and accessible name
 */
export function iconButton(name, label, onclick, properties = {}) {
  const { aria = {}, ...more } = properties;
  return element("button", { type: "button", className: "quiet", title: label, aria: { label, ...aria }, onclick, ...more }, icon(name));
}

/** @param {string} id */
export function byId(id) {
  return document.getElementById(id);
}

/** Downloads text as a file. */
export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

/** Copies text, also over plain HTTP, where `navigator.clipboard` is not available. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = element("textarea", { value: text, className: "visually-hidden" });
  const focused = document.activeElement;
  (document.querySelector("dialog[open]") ?? document.body).append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
  focused?.focus();
}

/** Limits `work` to one call per frame; after a slow call the next one is delayed. */
export function throttled(work) {
  let due = false;
  let cost = 0;
  const run = () => {
    due = false;
    const start = performance.now();
    work();
    cost = performance.now() - start;
  };
  return () => {
    if (due) return;
    due = true;
    if (cost < 8) requestAnimationFrame(run);
    else setTimeout(run, 4 * cost);
  };
}
