// The selected sentence in numbers: what it reads, what reads it, and the findings raised at it.
import { kindOf, KINDS } from "./api.js";
import { percent } from "./shares.js";
import { h, words } from "./dom.js";
import { headName } from "./heads.js";

const LISTED = 8;

export class Detail {
  constructor(onpick) {
    this.onpick = onpick;
    this.body = h("div", { class: "detail" });
    this.element = h("section", { class: "panel", "aria-live": "polite" }, h("h2", {}, "Selected sentence"), this.body);
  }

  draw(trace, index) {
    const sentence = trace.sentences[index];
    if (!sentence) {
      this.body.replaceChildren(h("p", { class: "note" }, "The first sentence is not closed yet."));
      return;
    }
    const rows = trace.captured[index];
    const missed = trace.unobserved[index];
    const here = trace.events.filter((event) => (event.sentence?.index ?? 0) === index).map((event) => KINDS[kindOf(event)]);
    this.body.replaceChildren(...[
      h("p", { class: "facts" }, h("b", {}, `#${index}`), " ", h("span", { class: `role ${sentence.role}` }, sentence.role),
        ` tokens ${sentence.first}–${sentence.end - 1} · ${rows} rows captured`, rows ? ` · ${percent(missed)} of its attention not observed` : ""),
      ...here.map((kind) => h("p", { class: "found" }, `${kind?.sign ?? "•"} ${kind?.name ?? "finding"} raised here: ${kind?.says ?? ""}`)),
      sentence.text ? h("blockquote", { dir: "auto" }, words(sentence.text)) : null,
      h("div", { class: "two" },
        this.#table(trace, `Sentence ${index} reads`, trace.reads(index), rows ? "nothing that was observed" : "not known: none of its rows was captured"),
        this.#table(trace, `Later sentences that read ${index}`, trace.readBy(index).filter(([row]) => row > index), "none yet")),
    ].filter(Boolean));
  }

  #table(trace, title, entries, empty) {
    return h("div", {}, h("h3", {}, title), entries.length ? h("table", { class: "entries" }, h("tbody", {}, entries.slice(0, LISTED).map(([at, share]) => {
      const other = trace.sentences[at];
      return h("tr", {}, h("td", { class: "number" }, percent(share)),
        h("td", {}, h("button", { type: "button", class: "link-like", onclick: () => this.onpick(at) }, `#${at}`), ` `, h("span", { class: `role ${other.role}` }, other.role)),
        h("td", { class: "clip", title: other.text || null }, other.text.trim() || `tokens ${other.first}–${other.end - 1}`));
    }))) : h("p", { class: "note" }, empty));
  }
}

/** One finding: what moved, how surprising it is, and buttons to the sentences it names. */
export function finding(event, onpick) {
  const kind = KINDS[kindOf(event)] ?? { name: kindOf(event), sign: "•", says: "" };
  const go = (index, text) => h("button", { type: "button", class: "link-like", onclick: () => onpick(index) }, text);
  const rare = event.pValue === undefined ? "not calibrated: how rare that is is not known" : `p = ${event.pValue.toPrecision(2)}`;
  const anchors = (title, list) => (list?.length ? h("p", {}, h("span", { class: "note" }, title), list.map((anchor) => [" ",
    go(anchor.sentence.index ?? 0, `#${anchor.sentence.index ?? 0}`), ` ${percent(anchor.share)}`])) : null);
  return h("div", { class: "finding" },
    h("p", {}, h("span", { class: `kind ${kindOf(event)}` }, kind.sign), " ", h("b", {}, kind.name), ` ${event.summary}`),
    h("p", { class: "note" }, `score ${(event.score ?? 0).toPrecision(3)}, threshold ${(event.threshold ?? 0).toPrecision(3)}; ${rare}. `,
      "At ", go(event.sentence?.index ?? 0, `#${event.sentence?.index ?? 0}`), ", began at ", go(event.began?.index ?? 0, `#${event.began?.index ?? 0}`), "."),
    anchors("turned from", event.fromAnchors), anchors(event.fromAnchors?.length ? "turned to" : "rests on", event.toAnchors),
    event.heads?.length ? h("p", { class: "note" }, "carried by ", event.heads.map((one) => `${headName(one.head)} (${percent(one.share)})`).join(", ")) : null);
}
