// Elements from values. All text goes in as text nodes: nothing from outside is ever read as markup.

/** An element. `properties`: attributes; `on...` is a listener, `data` a map; null, undefined and false leave one out. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "data") Object.assign(element.dataset, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** A notice with a heading; `level` is info, warning or error, which is also said in words. */
export function notice(level, heading, ...content) {
  return h("section", { class: `notice ${level}`, role: level === "info" ? null : "alert" },
    h("h2", {}, heading), ...content);
}

/** A sentence's text, trimmed, its special tokens (<|im_start|>, </s>, ...) set apart. */
export function words(text) {
  return text.trim().split(/(<\|[^<>|]{1,40}\|>|<\/?s>)/).filter(Boolean)
    .map((part, at, parts) => (/^<(\||\/?s>)/.test(part) && parts.length ? h("span", { class: "special" }, part) : part));
}

export const code = (text) => h("code", {}, text);

/** Arrow keys, Home and End move the focus along the elements that `selector` finds in `container`. */
export function arrowKeys(container, selector) {
  container.addEventListener("keydown", (event) => {
    const all = [...container.querySelectorAll(selector)];
    const at = all.indexOf(document.activeElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (at < 0 || to === undefined || !all[to]) return;
    event.preventDefault();
    all[to].focus();
  });
}

/** Replace the children of `container`, keeping the focus on the element of the same `data-key`. */
export function replaceKeepingFocus(container, children) {
  const key = container.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  container.replaceChildren(...children);
  if (key !== undefined) container.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus({ preventScroll: true });
}

const number = new Intl.NumberFormat("en");
export const count = (value) => number.format(value ?? 0);

/** "3 s ago", or the time of day, of Unix time in nanoseconds as a string. */
export function ago(nanoseconds) {
  const seconds = Math.max(0, (Date.now() - Number(nanoseconds) / 1e6) / 1000);
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  return seconds < 86400 ? `${Math.floor(seconds / 3600)} h ago` : clock(nanoseconds);
}

export function clock(nanoseconds) {
  const when = new Date(Number(nanoseconds) / 1e6);
  const today = when.toDateString() === new Date().toDateString();
  return today ? when.toLocaleTimeString() : when.toLocaleString();
}
