// The trace as a list of sentences, one of them selected: what it reads is shaded, the more the darker.
import { kindOf, KINDS } from "./api.js";
import { percent } from "./shares.js";
import { h, words } from "./dom.js";

const EDGE = 60;
/* Pixels of its neighbours that stay in sight. */
const MANY = 400;
/* From so many sentences on, those out of sight are not laid out. */
const LEAST = 1e-4;
/* Scores below it are as good as none; their number is in the title. */
const KEYS = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 };

export class SentenceList {
  #items = [];
  #trace = null;
  #selected = null;

  /** `onpick(sentence)`: the reader chose a sentence. */
  constructor(onpick) {
    this.onpick = onpick;
    this.list = h("ol", { class: "sentences", role: "listbox", tabindex: 0, "aria-label": "Sentences. Arrow keys select one", onkeydown: (event) => this.#key(event) });
    this.list.addEventListener("click", (event) => {
      const item = event.target.closest("li");
      if (item) this.onpick(Number(item.dataset.index));
    });
    this.element = h("section", { class: "panel reading" }, h("h2", {}, "Sentences"),
      h("p", { class: "note" }, "Select one: what it reads is shaded. The bar is its anchor score, as in the curve."), this.list);
  }

  draw(trace) {
    this.#trace = trace;
    const marks = new Map();
    for (const event of trace.events) {
      const at = event.sentence?.index ?? 0;
      marks.set(at, [...(marks.get(at) ?? []), event]);
    }
    // The first sentence holds the attention sink, beside which no bar could be seen.
    const most = Math.max(...trace.scores.subarray(1).filter((score) => score > 0), 1e-9);
    while (this.#items.length > trace.size) this.#items.pop().remove();
    const fresh = document.createDocumentFragment();
    for (const sentence of trace.sentences) {
      const signature = JSON.stringify([sentence, marks.get(sentence.index)?.length]);
      const held = this.#items[sentence.index];
      const item = held?.dataset.signature === signature ? held : this.#item(sentence, marks.get(sentence.index) ?? [], signature);
      if (!held) fresh.append(item);
      else if (held !== item) held.replaceWith(item);
      this.#items[sentence.index] = item;
      const score = trace.scores[sentence.index];
      item.querySelector(".bar").setAttribute("value", score > 0 ? Math.min(1, score / most) : 0);
      const said = item.querySelector(".score");
      said.textContent = score > 0 ? (score < LEAST ? `<${LEAST}` : score.toPrecision(2)) : "";
      said.title = score > 0 ? `anchor score ${score}` : "";
    }
    this.list.append(fresh);
    this.list.classList.toggle("many", trace.size > MANY);
    this.select(this.#selected, false);
  }

  /** Shade what sentence `index` reads, and bring it into sight if asked. */
  select(index, bring) {
    this.#selected = index;
    const shares = new Map(index === null || !this.#trace ? [] : this.#trace.reads(index));
    // The sink aside, the strongest read gets the full shade.
    const strongest = Math.max(...[...shares].filter(([column]) => column > 0 && column < index).map(([, share]) => share), 1e-9);
    for (const [at, item] of this.#items.entries()) {
      const chosen = at === index;
      if (chosen !== (item.getAttribute("aria-selected") === "true")) item.setAttribute("aria-selected", chosen);
      const share = chosen ? 0 : shares.get(at) ?? 0;
      const level = share > 0.002 ? Math.ceil(6 * Math.min(1, share / strongest)) : 0;
      if (item.dataset.level !== String(level)) item.dataset.level = level;
      item.querySelector(".share").textContent = level ? percent(share) : "";
    }
    const item = this.#items[index];
    if (!item) return;
    this.list.setAttribute("aria-activedescendant", item.id);
    if (bring) this.#bring(item);
  }

  /** Items out of sight have no measured height, so that after one move others may have come in between. */
  #bring(item, tries = 10) {
    const [box, place] = [this.list.getBoundingClientRect(), item.getBoundingClientRect()];
    const by = place.top < box.top ? place.top - box.top - EDGE : place.bottom > box.bottom ? place.bottom - box.bottom + EDGE : 0;
    if (!by || !tries) return;
    this.list.scrollTop += by;
    requestAnimationFrame(() => this.#items[this.#selected] === item && this.#bring(item, tries - 1));
  }

  #item(sentence, events, signature) {
    const tokens = sentence.end - sentence.first === 1 ? `token ${sentence.first}` : `tokens ${sentence.first}–${sentence.end - 1}`;
    return h("li", { role: "option", id: `sentence-${sentence.index}`, class: sentence.role, data: { index: sentence.index, level: 0, signature }, title: tokens },
      h("span", { class: "index" }, sentence.index),
      h("span", { class: `role ${sentence.role}` }, sentence.role),
      h("span", { class: "share", title: "share of the selected sentence's attention" }),
      h("span", { class: "words" }, sentence.text ? h("span", { class: "text", dir: "auto" }, words(sentence.text)) : h("span", { class: "note" }, tokens),
        events.map((event) => h("span", { class: `mark ${kindOf(event)}`, title: event.summary }, `${KINDS[kindOf(event)]?.sign ?? "•"} ${KINDS[kindOf(event)]?.name ?? ""}`))),
      h("span", { class: "measure" }, h("meter", { class: "bar", min: 0, max: 1, value: 0, "aria-label": "anchor score, relative" }), h("span", { class: "score" })));
  }

  #key(event) {
    if (!this.#trace?.size) return;
    const last = this.#trace.size - 1;
    const now = this.#selected ?? last;
    const to = { Home: 0, End: last }[event.key] ?? (KEYS[event.key] ? Math.min(last, Math.max(0, now + KEYS[event.key])) : null);
    if (to === null) return;
    event.preventDefault();
    this.onpick(to);
  }
}
