/**
 * Markdown that a model wrote, to elements that are safe to show.
 *
 * marked makes HTML, in which a model's own tags are text but for the simplest; highlight.js colours code; and DOMPurify keeps of
 * the result the elements and attributes listed here.
 * What is left cannot run, cannot load (pictures from elsewhere become links: fetching one would tell its server what was
 * asked), cannot pose as a part of the page (no class, id or style of its own) and can link only to the web and to mail.
 *
 * `MarkdownView` shows text that grows: it parses from the last blocks on and touches only the elements that changed.
 */

import { copy, element, icon } from "./dom.js";
import hljs from "./vendor/highlight.js";
import { Marked } from "./vendor/marked.js";
import DOMPurify from "./vendor/purify.js";

const LONGEST_COLOURED = 20_000;  // characters of code; above, colours would cost more than they tell

const ALLOWED = {
  ALLOWED_TAGS: [
    "p", "br", "hr", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "pre", "code", "span", "strong", "em", "b", "i", "u",
    "s", "del", "sub", "sup", "kbd", "mark", "small", "a", "img", "table", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd",
    "details", "summary",
  ],
  ALLOWED_ATTR: ["href", "src", "alt", "title", "class", "align", "start", "reversed", "colspan", "rowspan", "lang"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const PLAIN_TAGS = new Set(["br", "hr", "b", "i", "u", "s", "em", "strong", "sub", "sup", "kbd", "mark", "small", "details", "summary"]);
const TAG = /<\/?([a-z]+)\s*\/?>|[<>]/gi;  // without attributes
const OWN_CLASS = /^(?:hljs[\w-]*|language-[\w+#.-]+)$/;
const DRAWN_PICTURE = /^data:image\/(?:png|jpeg|gif|webp);/i;

const marked = new Marked({ gfm: true, breaks: true });
marked.use({
  renderer: {
    code: ({ text, lang }) => `<pre><code class="hljs language-${language(lang)}">${coloured(text, language(lang))}</code></pre>`,
    // The page's own headings are the title and who speaks.
    heading({ tokens, depth }) {
      const level = Math.min(6, depth + 2);
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
    html: ({ text }) => plainTags(text),
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

DOMPurify.addHook("uponSanitizeAttribute", (node, data) => {
  if (data.attrName !== "class") return;
  data.attrValue = data.attrValue.split(/\s+/).filter((name) => OWN_CLASS.test(name)).join(" ");
  data.keepAttr = data.attrValue !== "";
});

/** HTML among Markdown: the simplest tags count, all else is shown as it was written. */
function plainTags(text) {
  const shown = { "<": "&lt;", ">": "&gt;" };
  return text.replace(TAG, (tag, name) => (PLAIN_TAGS.has(name?.toLowerCase()) ? tag : tag.replace(/[<>]/g, (sign) => shown[sign])));
}

/** @returns {string} a name that highlight.js knows, or "plaintext" */
function language(info) {
  const name = info?.trim().split(/\s/, 1)[0].toLowerCase() ?? "";
  return hljs.getLanguage(name) ? name : "plaintext";
}

function coloured(text, name) {
  const known = text.length > LONGEST_COLOURED ? "plaintext" : name;
  return hljs.highlight(text, { language: known, ignoreIllegals: true }).value;
}

/**
 * @param {string} html from anybody
 * @returns {DocumentFragment} without anything that could do harm
 */
export function harmless(html) {
  const fragment = DOMPurify.sanitize(html, ALLOWED);
  for (const picture of fragment.querySelectorAll("img")) {
    if (!DRAWN_PICTURE.test(picture.getAttribute("src") ?? "")) picture.replaceWith(linkTo(picture));
  }
  for (const link of fragment.querySelectorAll("a")) {
    if (link.hasAttribute("href")) Object.assign(link, { target: "_blank", rel: "noopener noreferrer nofollow" });
    else link.replaceWith(...link.childNodes);  // it led somewhere that is not allowed
  }
  return fragment;
}

/** In a picture's place: its address, to be opened by who wants to. */
function linkTo(picture) {
  const [address, text] = [picture.getAttribute("src"), `[image: ${picture.alt || "without description"}]`];
  return address && !picture.closest("a") ? element("a", { href: address }, text) : element("span", {}, text);
}

/** The elements of one block of Markdown, with their buttons. */
function blockOf(html) {
  const block = element("div", { className: "block" }, harmless(html));
  for (const pre of block.querySelectorAll("pre")) frame(pre);
  for (const table of block.querySelectorAll("table")) {
    const scroller = element("div", { className: "table" });
    surround(table, scroller);
    scrollable(scroller, "Table");
  }
  return block;
}

/** Puts code under a line with its language and a button to copy it. */
function frame(pre) {
  const name = /language-(\S+)/.exec(pre.firstElementChild?.className ?? "")?.[1] ?? "plaintext";
  const label = element("span", {}, "Copy");
  const button = element("button", { type: "button", className: "quiet", aria: { label: "Copy the code" } }, icon("copy"), label);
  button.onclick = async () => {
    await copy(pre.textContent.replace(/\n$/, ""));
    label.textContent = "Copied";
    setTimeout(() => (label.textContent = "Copy"), 1500);
  };
  const bar = element("div", { className: "code-bar" }, element("span", {}, name === "plaintext" ? "text" : name), button);
  surround(pre, element("div", { className: "code" }, bar));
  scrollable(pre, name === "plaintext" ? "Code" : `Code in ${name}`);
}

function surround(node, wrapper) {
  node.replaceWith(wrapper);
  wrapper.append(node);
}

/** What may be wider than the page can be reached, and so scrolled, from the keyboard. */
function scrollable(node, label) {
  Object.assign(node, { tabIndex: 0, role: "region", ariaLabel: label });
}

/** Text that grows, shown as Markdown in an element. */
export class MarkdownView {
  #text = "";
  #growing = true;
  #blocks = [];  // {html, start, node}: the blocks shown, and where each begins in the text

  /** @param {HTMLElement} root */
  constructor(root) {
    this.root = root;
  }

  /**
   * @param {string} text all of it
   * @param {boolean} growing whether more is to come; else all of it is parsed once more, which also finds the links that
   *     are defined at its end
   */
  update(text, growing) {
    const clean = text.replace(/\r\n?/g, "\n");
    if (clean === this.#text && growing === this.#growing) return;
    const keep = growing && clean.startsWith(this.#text) ? Math.max(0, this.#blocks.length - 2) : 0;
    this.#text = clean;
    this.#growing = growing;
    const start = this.#blocks[keep]?.start ?? 0;
    this.#show(keep, parse(clean.slice(start), start));
  }

  /** The text of the blocks that will not change any more, from the `from`th on: for reading aloud. */
  finished(from, growing) {
    return this.#blocks.slice(from, growing ? -2 : undefined).map(({ node }) => node.innerText ?? node.textContent);
  }

  #show(keep, found) {
    found.forEach((block, index) => {
      const old = this.#blocks[keep + index];
      block.node = old?.html === block.html ? old.node : blockOf(block.html);
      if (!old) this.root.append(block.node);
      else if (old.node !== block.node) old.node.replaceWith(block.node);
    });
    for (const { node } of this.#blocks.slice(keep + found.length)) node.remove();
    this.#blocks.splice(keep, Infinity, ...found);
  }
}

function parse(text, start) {
  const found = [];
  for (const token of marked.lexer(text)) {
    if (token.type !== "space" && token.type !== "def") found.push({ html: marked.parser([token]), start });
    start += token.raw.length;
  }
  return found;
}
