// The requests that the monitor holds, newest first.
import { ALL_KINDS, ask, externalId, plain, role, traceLink } from "./api.js";
import { ago, arrowKeys, count, h, notice, replaceKeepingFocus, words } from "./dom.js";
import { Live, Throttle } from "./live.js";
import { stateOf, stateSign } from "./state.js";
import { howToBegin, onStatus } from "./status.js";
import { Filters } from "./filters.js";

const PAGE = 200;

export function showRequests(view, query) {
  let requests = [];
  let more = "";
  const filters = new Filters(query, [
    { name: "find", label: "Request id", type: "search", placeholder: "part of an id" },
    { name: "state", label: "State", options: ["running", "finished", "cut"] },
    { name: "model_name", label: "Model", type: "text", list: "models" },
    { name: "engine", label: "Engine", type: "text", list: "engine-names" },
  ], () => refresh.call());
  const body = h("tbody");
  const rows = h("table", { class: "list" },
    h("caption", { class: "hidden" }, "Requests, newest first. Arrow keys move between them, Enter opens one."),
    h("thead", {}, h("tr", {}, ["Request", "Model", "State", "Tokens", "Sentences", "Rows", "Findings", "Last seen", "Top anchor now"]
      .map((name, at) => h("th", { scope: "col", class: [3, 4, 5, 6].includes(at) ? "number" : null }, name)))),
    body);
  const under = h("p", { class: "note" });
  const place = h("div", {});
  arrowKeys(body, "a.row");
  view.append(h("h1", {}, "Requests"), filters.element, place);

  function draw() {
    const { find, state } = filters.values;
    const shown = requests.filter((info) =>
      (!state || stateOf(info) === state) && (!find || `${info.key.requestId} ${externalId(info)}`.includes(find)));
    if (!shown.length) {
      place.replaceChildren(requests.length || filters.active
        ? notice("info", "No request matches", h("p", {}, "Clear a filter above to see more."))
        : howToBegin() ?? notice("info", "No request yet",
          h("p", {}, "The engine is connected. Send it a request, as any OpenAI client does; it appears here at once.")));
      return;
    }
    replaceKeepingFocus(body, shown.map(row));
    under.textContent = more
      ? `The newest ${count(requests.length)} are listed; name a model, an engine or a whole id to see older ones.` : "";
    if (!rows.isConnected) place.replaceChildren(h("div", { class: "scroll" }, rows), under);
  }

  async function load() {
    const { find, model_name, engine } = filters.values;
    let answer = await ask("/api/requests", { model_name, engine, page_size: PAGE });
    if (find && !(answer.requests ?? []).some((info) => `${info.key.requestId} ${externalId(info)}`.includes(find))) {
      // Perhaps an older one, by its whole id.
      const exact = await ask("/api/requests", { model_name, engine, request_id: find });
      if (exact.requests?.length) answer = exact;
    }
    requests = answer.requests ?? [];
    more = answer.nextPageToken ?? "";
    filters.offer("models", requests.map((info) => info.modelName));
    filters.offer("engine-names", requests.map((info) => info.engine));
    draw();
  }

  const refresh = new Throttle(() => load().catch(() => {}));
  const live = new Live({ kinds: ALL_KINDS }, () => refresh.call(), () => refresh.call());
  const stop = onStatus(() => (requests.length ? null : draw()));
  const clock = setInterval(() => requests.length && draw(), 5000);
  return () => {
    live.close();
    refresh.stop();
    stop();
    clearInterval(clock);
  };
}


function row(info) {
  const top = info.topAnchor?.sentence;
  const findings = info.events ?? 0;
  return h("tr", { data: { request: info.key.requestId } },
    h("td", {}, h("a", { class: "row", href: traceLink(info.key), data: { key: info.key.requestId + info.key.engineInstance } }, externalId(info)),
      info.key.sampleIndex ? h("span", { class: "note" }, ` sample ${info.key.sampleIndex}`) : null),
    h("td", {}, info.modelName, h("span", { class: "note" }, ` · ${info.engine}`)),
    h("td", {}, state(info)),
    h("td", { class: "number", title: "prompt + sampled" }, `${count(info.promptTokens)} + ${count(info.outputTokens)}`),
    h("td", { class: "number" }, count(info.sentences)),
    h("td", { class: "number", title: "rows captured" }, count(info.rowsKept)),
    h("td", { class: "number" }, findings ? h("b", { class: "found" }, `◆ ${count(findings)}`) : "0"),
    h("td", {}, ago(info.lastSeenNs)),
    h("td", { class: "anchor" }, top ? [`${Math.round(100 * info.topAnchor.share)}% on #${top.index ?? 0} `,
      h("span", { class: `role ${role(top)}` }, role(top)), top.text ? h("q", { class: "note" }, words(top.text)) : null] : "–"));
}

function state(info) {
  if (info.refusedReason) return h("span", { class: "state warn" }, `⊘ not captured: ${plain(info.refusedReason, "")}`);
  const missing = info.missingRanks?.length ? h("span", { class: "state warn" }, ` ⚠ without ${info.missingRanks.join(", ")}`) : null;
  return [stateSign(info), missing];
}
