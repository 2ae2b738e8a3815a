// Checks that the tests of the chat page evaluate in the browser: one object of functions.

({
  /** Elements and attributes that must not occur in rendered text, except the icons of the page's buttons. */
  harm(where) {
    const tags = ["script", "img", "iframe", "svg", "math", "form", "input", "style", "video", "base"];
    const bad = ([tag, name, value]) =>
      tags.includes(tag) || name.startsWith("on") || ["style", "id", "action"].includes(name) || /^\s*(javascript|data):/i.test(value);
    return [...document.querySelectorAll(`${where} *`)]
      .filter((each) => !each.closest("svg.icon"))
      .flatMap((each) => [[each.localName, "", ""], ...[...each.attributes].map(({ name, value }) => [each.localName, name, value])])
      .filter(bad);
  },

  links(where) {
    return [...document.querySelectorAll(`${where} a`)].map((link) => [link.getAttribute("href"), link.target, link.rel]);
  },

  /** Attempts what the policy forbids; returns the result of each attempt. */
  async attempts() {
    const ended = [];
    const attempt = async (run) => {
      try {
        await run();
        ended.push("done");
      } catch (error) {
        ended.push(error.name);
      }
    };
    document.addEventListener("securitypolicyviolation", ({ effectiveDirective }) => (window.seen ??= []).push(effectiveDirective));
    await attempt(() => document.body.insertAdjacentHTML("beforeend", "<b>x</b>"));
    await attempt(() => fetch("https://evil.example/"));
    await attempt(() => (document.createElement("script").text = "window.ran = true"));
    document.body.append(Object.assign(new Image(), { src: "https://evil.example/x.png" }));
    const styled = document.body.appendChild(document.createElement("p"));
    styled.setAttribute("style", "color: rgb(255, 0, 0)");
    await new Promise((done) => setTimeout(done, 100));
    return { ended, seen: window.seen, color: getComputedStyle(styled).color };
  },

  atEnd() {
    const { scrollHeight, scrollTop, clientHeight } = document.getElementById("scroller");
    return scrollTop > 50 && scrollHeight - scrollTop - clientHeight < 48;
  },

  /** Records, from now on, the largest distance to the end and the largest upward movement between two frames, in pixels. */
  observeScrolling() {
    const scroller = document.getElementById("scroller");
    window.scrolling = { away: 0, up: 0 };
    let last = scroller.scrollTop;
    const frame = () => {
      const { scrollHeight, scrollTop, clientHeight } = scroller;
      window.scrolling.away = Math.max(window.scrolling.away, scrollHeight - scrollTop - clientHeight);
      window.scrolling.up = Math.max(window.scrolling.up, last - scrollTop);
      last = scrollTop;
      requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
  },

  /** The stored conversations. */
  stored() {
    const keys = Object.keys(localStorage).filter((key) => key.startsWith("bumblebee.conversation."));
    return keys.map((key) => JSON.parse(localStorage.getItem(key)));
  },

  /** Marks the finished blocks: all but the last two. */
  mark() {
    [...document.querySelectorAll(".block")].slice(0, -2).forEach((block) => (block.marked = true));
  },

  marked() {
    return [...document.querySelectorAll(".block")].filter((block) => block.marked).length;
  },

  /** The focused element, and whether its focus is visible: by its outline, or by the shadow of its box. */
  focused() {
    const each = document.activeElement;
    if (each === document.body) return ["", true];
    const outlined = each.type === "radio" ? each.nextElementSibling : each;
    const box = each.closest("form, label") ?? each;
    const seen = getComputedStyle(outlined).outlineStyle !== "none" || getComputedStyle(box).boxShadow !== "none";
    return [each.id || each.ariaLabel || each.textContent.trim() || each.tagName, seen];
  },

  /** Controls without an accessible name. */
  nameless() {
    const named = (each) => each.ariaLabel || each.textContent.trim() || [...(each.labels ?? [])].some((label) => label.textContent.trim());
    return [...document.querySelectorAll("button, input, textarea, select, a, summary")]
      .filter((each) => !named(each))
      .map((each) => each.outerHTML);
  },

  ids() {
    return [...document.querySelectorAll("[id]")].map((each) => each.id);
  },

  /** Ids that attributes refer to. */
  referred() {
    const names = ["aria-describedby", "aria-labelledby", "aria-controls", "for", "popovertarget"];
    return [...document.querySelectorAll("*")].flatMap((each) => names.map((name) => each.getAttribute(name))).filter(Boolean);
  },

  /** Visible controls smaller than 44 px, too small for touch. */
  small() {
    return [...document.querySelectorAll("button, input:not([hidden])")]
      .filter((each) => each.checkVisibility({ checkVisibilityCSS: true }))
      .map((each) => [each.id || each.ariaLabel || each.textContent, each.getBoundingClientRect()])
      .filter(([, { width, height }]) => width && (width < 44 || height < 44))
      .map(([name, { width, height }]) => `${name}: ${width} x ${height}`);
  },

  /** Texts with a contrast below 4.5 : 1 (WCAG 2.2, 1.4.3), on blended backgrounds; disabled controls are exempt. */
  faint() {
    const rgba = (text) => {
      const [r, g, b, alpha = 1] = text.match(/[\d.]+/g).map(Number);
      return text.startsWith("color(") ? [r * 255, g * 255, b * 255, alpha] : [r, g, b, alpha];
    };
    const over = (above, below) => [0, 1, 2].map((i) => above[i] * above[3] + below[i] * (1 - above[3])).concat(1);
    const linear = (value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
    const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const ground = (each) => (each ? over(rgba(getComputedStyle(each).backgroundColor), ground(each.parentElement)) : [255, 255, 255, 1]);
    const shown = (each) => each.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true });
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const [text, each] = [walker.currentNode.data.trim(), walker.currentNode.parentElement];
      if (!text || !shown(each) || each.closest(":disabled, .visually-hidden")) continue;
      const below = ground(each);
      const pair = [luminance(over(rgba(getComputedStyle(each).color), below)), luminance(below)];
      const contrast = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
      if (contrast < 4.5) found.push([text.slice(0, 40), contrast]);
    }
    return found;
  },

  /** Records announcements to screen readers from now on. */
  hear() {
    window.heard = [];
    const note = (changes) => changes.forEach(({ addedNodes }) => addedNodes.forEach((node) => window.heard.push(node.textContent)));
    new MutationObserver(note).observe(document.getElementById("spoken"), { childList: true });
  },

  /** Measures the longest task, in milliseconds, from now on. */
  watch() {
    window.longest = 0;
    const note = (list) => list.getEntries().forEach(({ duration }) => (window.longest = Math.max(window.longest, duration)));
    new PerformanceObserver(note).observe({ type: "longtask" });
  },

  moving() {
    return [...document.querySelectorAll("*")].filter((each) => parseFloat(getComputedStyle(each).transitionDuration) > 0).length;
  },

  smallestField() {
    return Math.min(...[...document.querySelectorAll("input, textarea, select")].map((each) => parseFloat(getComputedStyle(each).fontSize)));
  },

  /** Fills the browser's storage completely. */
  fill() {
    for (let n = 0, size = 1 << 20; size > 0; n++) {
      try {
        localStorage.setItem(`x${n}`, "x".repeat(size));
      } catch {
        size >>= 1;
      }
    }
  },

  async insertSanitized(html) {
    const { sanitize } = await import("/page/markdown.js");
    document.getElementById("thread").append(sanitize(html));
  },
})
