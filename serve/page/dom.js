/** Small tools for making elements. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * @param {string} tag
 * @param {object} properties set on the element; `dataset` and `aria` are objects of their own
 * @param {...(Node|string)} children
 */
export function element(tag, { dataset = {}, aria = {}, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  Object.assign(made.dataset, dataset);
  for (const [name, value] of Object.entries(aria)) made.setAttribute(`aria-${name}`, value);
  made.append(...children);
  return made;
}

/** One of the drawings at the top of index.html. */
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
 * @param {string} label what the button does; shown on hover, said by screen readers
 */
export function iconButton(name, label, onclick, properties = {}) {
  const { aria = {}, ...more } = properties;
  return element("button", { type: "button", className: "quiet", title: label, aria: { label, ...aria }, onclick, ...more }, icon(name));
}

/** @param {string} id */
export function byId(id) {
  return document.getElementById(id);
}

/** Offers text as a file. */
export function download(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

/** Copies text, also where the page comes over plain HTTP and the clipboard's modern interface is missing. */
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

/** At most one call a frame, however often it is asked for; a slow call makes the next one wait. */
export function throttled(work) {
  let due = false;
  let cost = 0;
  const run = () => {
    due = false;
    const begin = performance.now();
    work();
    cost = performance.now() - begin;
  };
  return () => {
    if (due) return;
    due = true;
    if (cost < 8) requestAnimationFrame(run);
    else setTimeout(run, 4 * cost);
  };
}
