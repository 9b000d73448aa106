// Findings of all requests, newest first: those the monitor holds, then each as it comes.
import { externalId, FINDINGS, kindOf, KINDS, plain, traceLink } from "./api.js";
import { arrowKeys, clock, count, h, notice, replaceKeepingFocus, words } from "./dom.js";
import { Live } from "./live.js";
import { howToBegin, onStatus } from "./status.js";
import { Filters } from "./filters.js";

const MOST = 500;
const DRAW_MILLISECONDS = 200;

export function showEvents(view, query) {
  let found = [];
  let live = null;
  let drawing = null;
  const filters = new Filters(query, [
    { name: "find", label: "Request id", type: "search", placeholder: "part of an id" },
    { name: "kind", label: "Kind", options: FINDINGS.map((kind) => [kind, KINDS[kind].name]) },
    { name: "severity", label: "At least", options: ["info", "warning", "critical"] },
    { name: "model", label: "Model", type: "text", list: "models" },
    { name: "engine", label: "Engine", type: "text", list: "engine-names" },
  ], changed);
  const body = h("tbody");
  const table = h("table", { class: "list" },
    h("caption", { class: "hidden" }, "Findings, newest first. Arrow keys move between them, Enter opens the trace."),
    h("thead", {}, h("tr", {}, ["Time", "Finding", "Request", "Model", "What was seen", "p"]
      .map((name) => h("th", { scope: "col" }, name)))), body);
  const under = h("p", { class: "note" });
  const place = h("div");
  arrowKeys(body, "a.row");
  view.append(h("h1", {}, "Findings"),
    h("p", { class: "note" }, "A finding is a signal to look, not a verdict: open the trace behind it."), filters.element, place);

  let asked = "";
  function changed() {
    const { kind, severity, model, engine } = filters.values;
    const parameters = {
      kinds: kind && `EVENT_KIND_${kind}`, minimum_severity: severity && `SEVERITY_${severity.toUpperCase()}`,
      model_names: model, engines: engine, last: MOST,
    };
    const now = JSON.stringify(parameters);
    if (now !== asked) {
      asked = now;
      live?.close();
      found = [];
      live = new Live(parameters, take, soon);
    }
    soon();
  }

  function take(event) {
    // After a restart the monitor may tell again what it kept.
    if (found.some((held) => keyOf(held) === keyOf(event))) return;
    found.unshift(event);
    found.length = Math.min(found.length, MOST);
    filters.offer("models", [event.modelName]);
    filters.offer("engine-names", [event.engine]);
    soon();
  }

  function soon() {
    drawing ??= setTimeout(draw, DRAW_MILLISECONDS);
  }

  function draw() {
    drawing = null;
    const { find } = filters.values;
    const shown = found.filter((event) => !find || `${event.key.requestId} ${externalId(event)}`.includes(find));
    if (!shown.length) {
      place.replaceChildren(filters.active ? notice("info", "No finding matches", h("p", {}, "Clear a filter above to see more."))
        : howToBegin() ?? notice("info", "No finding yet", h("p", {},
          "Requests are watched; a finding appears here as it is raised. ", h("a", { href: "/" }, "The requests"), " show what their reasoning rests on now.")));
      return;
    }
    replaceKeepingFocus(body, shown.map(row));
    under.textContent = found.length === MOST ? `The newest ${count(MOST)} are listed.` : "";
    if (!table.isConnected) place.replaceChildren(h("div", { class: "scroll" }, table), under);
  }

  changed();
  const stop = onStatus(() => (found.length ? null : soon()));
  return () => {
    live?.close();
    stop();
    clearTimeout(drawing);
  };
}

const keyOf = (event) => `${event.key.requestId} ${event.sentence?.index ?? 0} ${event.kind} ${event.wallTimeNs}`;

function row(event) {
  const kind = KINDS[kindOf(event)] ?? { name: plain(event.kind, "EVENT_KIND_"), sign: "•" };
  return h("tr", {},
    h("td", { class: "when" }, clock(event.wallTimeNs)),
    h("td", { class: "kind" }, h("span", { class: `kind ${kindOf(event)}` }, kind.sign), ` ${kind.name}`,
      event.severity === "SEVERITY_WARNING" ? null : h("span", { class: "note" }, ` ${plain(event.severity, "SEVERITY_")}`)),
    h("td", {}, h("a", { class: "row", href: traceLink(event.key, event.sentence?.index ?? 0), data: { key: keyOf(event) } }, externalId(event))),
    h("td", {}, event.modelName, h("span", { class: "note" }, ` · ${event.engine}`)),
    h("td", { class: "says" }, event.summary, event.sentence?.text ? h("q", { class: "note quote" }, words(event.sentence.text)) : null),
    h("td", { class: "number", title: "how often a request without cause has as high a score" }, event.pValue?.toPrecision(2) ?? "–"));
}
