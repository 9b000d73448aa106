// One request: its sentences, what they rest on, and what was found, while it runs and afterwards.
import { address, ALL_KINDS, ask, externalId, plain, traceLink } from "./api.js";
import { Curve } from "./curve.js";
import { Detail, finding } from "./detail.js";
import { count, h, notice, code } from "./dom.js";
import { Heads } from "./heads.js";
import { HeatMap } from "./heatmap.js";
import { Live, Throttle } from "./live.js";
import { Trace } from "./matrix.js";
import { SentenceList } from "./sentences.js";
import { percent } from "./shares.js";
import { stateOf, stateSign } from "./state.js";

const REFUSED = {
  client_disabled: "the client asked not to be monitored, and the operator allows that",
  request_limit: "more requests ran at a time than are captured (setting max_requests)",
  prompt_embeds: "its prompt was given as embeddings, without token ids",
};
const NO_TEXT = {
  not_sent: ["Text is private here: ", "the engine sends no token ids, so sentences are shown by number and token positions. ", code("STREAM_MONITOR_SEND_TOKEN_IDS=true"), " for the engine and ", code("--tokenizers MODEL_FOLDER"), " for the monitor would show it."],
  no_tokenizer: ["Token ids came, but the monitor has no tokenizer for this model: ", "start it with ", code("--tokenizers MODEL_FOLDER"), "."],
  tokenizer_mismatch: ["The tokenizer that the monitor was given is another model's: ", "text would be wrong, so none is shown (setting ", code("tokenizers"), ")."],
};

export function showTrace(view, query) {
  const key = { request_id: query.get("request_id"), engine_instance: query.get("engine_instance"), sample_index: query.get("sample_index") };
  let trace = null;
  let selected = query.has("sentence") ? Number(query.get("sentence")) : null;
  let following = selected === null;
  let brought = false;
  const head = h("div", { class: "head" });
  const notes = h("div");
  const pick = (index) => choose(index, false);
  const [sentences, curve, heatmap, detail] = [new SentenceList(pick), new Curve(pick), new HeatMap(pick), new Detail(pick)];
  const heads = new Heads();
  const charts = h("div", { class: "charts" }, curve.element, heatmap.element);
  const follow = h("input", { type: "checkbox", onchange: () => choose(null, follow.checked) });
  sentences.element.querySelector("h2").append(h("label", { class: "follow" }, follow, " follow the newest"));
  const found = h("section", { class: "panel" });
  const body = h("div", { class: "trace" }, sentences.element, charts,
    h("div", { class: "aside" }, detail.element, found));
  view.append(head, notes);

  function choose(index, follows) {
    following = follows;
    selected = follows ? trace.size - 1 : index ?? selected;
    const sentence = follows ? null : selected;
    history.replaceState(null, "", address("/trace", { ...key, sentence }));
    select(true);
  }

  function select(bring) {
    follow.checked = following;
    sentences.select(selected, bring);
    curve.draw(trace, selected);
    detail.draw(trace, selected);
  }

  function draw() {
    if (selected === null && stateOf(trace.info) !== "running" && trace.events.length) {
      [selected, following] = [trace.events.at(-1).sentence?.index ?? 0, false];
    }
    if (following) selected = trace.size ? trace.size - 1 : null;
    drawHead(head, trace, key);
    notes.replaceChildren(...remarks(trace.info));
    if (!body.isConnected) view.append(body);
    sentences.draw(trace);
    heatmap.draw(trace);
    if (Heads.in(trace) && !heads.element.isConnected) charts.append(heads.element);
    heads.draw(trace);
    found.replaceChildren(h("h2", {}, `Findings (${trace.info.events ?? 0})`), ...(trace.events.length
      ? trace.events.toReversed().map((event) => finding(event, pick)) : [h("p", { class: "note" }, "None so far.")]));
    select(following || !brought);
    brought = true;
  }

  async function load() {
    try {
      trace = new Trace(await ask("/api/trace", key));
    } catch (error) {
      if (error.code === "UNREACHABLE" && trace) return; // What is shown stays; the top line tells.
      body.remove();
      head.replaceChildren(h("h1", {}, key.request_id ?? "No request"));
      notes.replaceChildren(await trouble(error, key));
      return;
    }
    draw();
    if (selected !== null) document.title = `${externalId(trace.info)} · Stream Monitor`;
  }

  const refresh = new Throttle(load);
  const live = new Live({ kinds: ALL_KINDS, request_ids: key.request_id }, () => refresh.call(), () => refresh.call());
  const themed = () => trace && draw();
  addEventListener("themechange", themed);
  return () => {
    live.close();
    refresh.stop();
    removeEventListener("themechange", themed);
    document.title = "Stream Monitor";
  };
}

function drawHead(head, trace, key) {
  const { info } = trace;
  const seen = trace.unobserved.filter((share) => !Number.isNaN(share));
  const mean = seen.length ? seen.reduce((sum, share) => sum + share, 0) / seen.length : null;
  const facts = [["Model", `${info.modelName} · engine ${info.engine}`], ["Prompt", `${count(info.promptTokens)} tokens`],
    ["Sampled", `${count(info.outputTokens)} tokens`], ["Sentences", count(info.sentences)],
    ["Rows captured", count(info.rowsKept)], ["Not observed", mean === null ? "–" : percent(mean)]];
  head.replaceChildren(
    h("div", {}, h("h1", {}, externalId(info), " ", stateSign(info)),
      h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))))),
    h("a", { class: "button", href: address("/api/trace", { ...key, download: 1 }), download: true }, "↓ Download (JSON)"));
}

function remarks(info) {
  const found = [];
  if (info.refusedReason) found.push(notice("warning", "This request is not captured", h("p", {}, `Reason: ${plain(info.refusedReason, "")}`, REFUSED[info.refusedReason] ? `: ${REFUSED[info.refusedReason]}.` : ".")));
  if (info.missingRanks?.length) found.push(notice("warning", `Ranks are missing: ${info.missingRanks.join(", ")}`, h("p", {}, "In some steps these did not arrive in time. The shares below are of the heads of the others.")));
  if (info.noTextReason && !info.refusedReason) {
    const [first, ...rest] = NO_TEXT[info.noTextReason] ?? [info.noTextReason];
    found.push(h("p", { class: "notice info slim" }, h("b", {}, first), rest));
  }
  return found;
}

/** Why there is no trace to show, and where to go from there. */
async function trouble(error, key) {
  if (error.code === "FAILED_PRECONDITION") {
    const { requests = [] } = await ask("/api/requests", { request_id: key.request_id }).catch(() => ({}));
    return notice("info", "Several requests carry this id", h("ul", {}, requests.map((info) => h("li", {}, h("a", { href: traceLink(info.key) },
      `${info.key.requestId}`), ` · ${info.modelName}, sample ${info.key.sampleIndex ?? 0}, ${count(info.outputTokens)} tokens`))));
  }
  if (error.code === "NOT_FOUND") return notice("warning", "The monitor does not hold this request", h("p", {}, "It is unknown here, was deleted, or made room for newer ones (settings store_days, store_bytes, max_traces and max_trace_bytes). ", h("a", { href: "/" }, "All requests")));
  return notice("error", "The trace cannot be shown", h("p", {}, error.message, ". This page tries again by itself."));
}
