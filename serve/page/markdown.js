/**
 * Renders a model's Markdown to safe elements.
 *
 * marked converts it to HTML, where all HTML but tables and the simplest tags is escaped; highlight.js highlights code; and DOMPurify
 * removes all elements and attributes that are not listed here. The result cannot run scripts, cannot load resources (remote
 * images become links, because fetching one would leak the conversation to its server), cannot imitate the page (no class, id
 * or style) and can only link to the web and to mail addresses.
 *
 * `MarkdownView` renders growing text: it parses only the last blocks again and replaces only the elements that changed.
 */

import { copy, element, icon } from "./dom.js";
import hljs from "./vendor/highlight.js";
import { Marked } from "./vendor/marked.js";
import DOMPurify from "./vendor/purify.js";

const MAX_HIGHLIGHTED = 20_000;  // characters of code; highlighting more would be too slow

const ALLOWED = {
  ALLOWED_TAGS: [
    "p", "br", "hr", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "pre", "code", "span", "strong", "em", "b", "i", "u",
    "s", "del", "sub", "sup", "kbd", "mark", "small", "a", "img", "table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td",
    "dl", "dt", "dd", "details", "summary",
  ],
  ALLOWED_ATTR: ["href", "src", "alt", "title", "class", "align", "start", "reversed", "colspan", "rowspan", "lang"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  // Without this list, the expression above applies to the value of every attribute.
  ADD_URI_SAFE_ATTR: ["align", "start", "reversed", "colspan", "rowspan", "lang"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const PLAIN_TAGS = new Set(["br", "hr", "b", "i", "u", "s", "em", "strong", "sub", "sup", "kbd", "mark", "small", "details", "summary"]);
const TABLE_TAGS = new Set(["table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td", "p", "ul", "ol", "li", "code"]);
const TABLE = /^\s*<table\b[^<>]*>\s*<(?:caption|thead|tbody|tr)\b/i;  // not a sentence that names the tag
const LAYOUT = /\b(align|colspan|rowspan)\s*=\s*["']?(\w+)/gi;
const TAG = /<(\/?)([a-z]+)\b([^<>]*)>|[<>]/gi;
const NO_ATTRIBUTES = /^\s*\/?$/;
const ESCAPED = { "<": "&lt;", ">": "&gt;" };
const ALLOWED_CLASS = /^(?:hljs[\w-]*|language-[\w+#.-]+)$/;
const INLINE_IMAGE = /^data:image\/(?:png|jpeg|gif|webp);/i;

const marked = new Marked({ gfm: true, breaks: true });
marked.use({
  renderer: {
    code: ({ text, lang }) => `<pre><code class="hljs language-${language(lang)}">${highlighted(text, language(lang))}</code></pre>`,
    // Levels 1 and 2 are the page's own: the title, and the role of each message.
    heading({ tokens, depth }) {
      const level = Math.min(6, depth + 2);
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
    html: ({ text, block }) => safeTags(text, Boolean(block) && TABLE.test(text)),
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

DOMPurify.addHook("uponSanitizeAttribute", (node, data) => {
  if (data.attrName !== "class") return;
  data.attrValue = data.attrValue.split(/\s+/).filter((name) => ALLOWED_CLASS.test(name)).join(" ");
  data.keepAttr = data.attrValue !== "";
});

/** HTML within Markdown: keeps the simplest tags, and those of a table with its layout; escapes all others. */
function safeTags(text, inTable) {
  return text.replace(TAG, (tag, slash, name = "", attributes = "") => {
    if (inTable && TABLE_TAGS.has(name.toLowerCase())) return `<${slash}${name}${slash ? "" : layoutOf(attributes)}>`;
    const plain = PLAIN_TAGS.has(name.toLowerCase()) && NO_ATTRIBUTES.test(attributes);
    return plain ? tag : tag.replace(/[<>]/g, (sign) => ESCAPED[sign]);
  });
}

/** The attributes of a table's tag that are kept, written anew. */
function layoutOf(attributes) {
  return [...attributes.matchAll(LAYOUT)].map(([, name, value]) => ` ${name}="${value}"`).join("");
}

/** @returns {string} a language of highlight.js, or "plaintext" */
function language(info) {
  const name = info?.trim().split(/\s/, 1)[0].toLowerCase() ?? "";
  return hljs.getLanguage(name) ? name : "plaintext";
}

function highlighted(text, name) {
  const known = text.length > MAX_HIGHLIGHTED ? "plaintext" : name;
  return hljs.highlight(text, { language: known, ignoreIllegals: true }).value;
}

/**
 * @param {string} html untrusted
 * @returns {DocumentFragment} safe to insert
 */
export function sanitize(html) {
  const fragment = DOMPurify.sanitize(html, ALLOWED);
  for (const image of fragment.querySelectorAll("img")) {
    if (!INLINE_IMAGE.test(image.getAttribute("src") ?? "")) image.replaceWith(linkTo(image));
  }
  for (const link of fragment.querySelectorAll("a")) {
    if (link.hasAttribute("href")) Object.assign(link, { target: "_blank", rel: "noopener noreferrer nofollow" });
    else link.replaceWith(...link.childNodes);  // its target is not allowed
  }
  return fragment;
}

/** A link that replaces a remote image. */
function linkTo(image) {
  const [url, text] = [image.getAttribute("src"), `[image: ${image.alt || "without description"}]`];
  return url && !image.closest("a") ? element("a", { href: url }, text) : element("span", {}, text);
}

/** The elements of a Markdown block, with copy buttons. */
function blockOf(html) {
  const block = element("div", { className: "block" }, sanitize(html));
  for (const pre of block.querySelectorAll("pre")) frame(pre);
  for (const list of block.querySelectorAll("ol")) indent(list);
  for (const table of block.querySelectorAll("table")) {
    const scroller = element("div", { className: "table" });
    surround(table, scroller);
    scrollable(scroller, "Table");
  }
  return block;
}

/** Makes room for numbers of more than two digits. */
function indent(list) {
  const digits = String(list.start + list.childElementCount - 1).length;
  if (digits > 2) list.style.paddingLeft = `calc(${digits}ch + 1rem)`;
}

/** Adds a bar with the language and a copy button to a code block. */
function frame(pre) {
  const name = /language-(\S+)/.exec(pre.firstElementChild?.className ?? "")?.[1] ?? "plaintext";
  const label = element("span", {}, "Copy");
  const button = element("button", { type: "button", className: "quiet", aria: { label: "Copy code" } }, icon("copy"), label);
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

/** Makes an element that may be wider than the page focusable, so that it can be scrolled with the keyboard. */
function scrollable(node, label) {
  Object.assign(node, { tabIndex: 0, role: "region", ariaLabel: label });
}

/** Growing text, rendered as Markdown in an element. */
export class MarkdownView {
  #text = "";
  #growing = true;
  #blocks = [];  // {html, start, node}: the rendered blocks and their positions in the text

  /** @param {HTMLElement} root */
  constructor(root) {
    this.root = root;
  }

  /**
   * @param {string} text the whole text
   * @param {boolean} growing whether more text follows; if not, everything is parsed again, which also resolves links that
   *     are defined at the end
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

  /** The text of the blocks that are final, from block `from` on, for screen readers. */
  finished(from, growing) {
    return this.#blocks.slice(from, growing ? -2 : undefined).map(({ node }) => node.innerText ?? node.textContent);
  }

  #show(keep, blocks) {
    blocks.forEach((block, index) => {
      const old = this.#blocks[keep + index];
      block.node = old?.html === block.html ? old.node : blockOf(block.html);
      if (!old) this.root.append(block.node);
      else if (old.node !== block.node) old.node.replaceWith(block.node);
    });
    for (const { node } of this.#blocks.slice(keep + blocks.length)) node.remove();
    this.#blocks.splice(keep, Infinity, ...blocks);
  }
}

function parse(text, start) {
  const blocks = [];
  for (const token of marked.lexer(text)) {
    if (token.type !== "space" && token.type !== "def") blocks.push({ html: marked.parser([token]), start });
    start += token.raw.length;
  }
  return blocks;
}
