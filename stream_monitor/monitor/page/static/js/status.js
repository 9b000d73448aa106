// Which engines are connected and how much of their rows arrives: on the page's top line, and for empty views.
import { ask } from "./api.js";
import { code, h, notice } from "./dom.js";

const EVERY_MILLISECONDS = 5000;
const line = document.getElementById("engines");
const signOutButton = document.getElementById("signout");
const listeners = new Set();
export const status = { known: false, text: false, fleet: false, engines: [] };

/** Calls `listener` after each look at the monitor; returns how to stop that. */
export function onStatus(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

let timer = null;

export async function watchStatus() {
  clearTimeout(timer);
  try {
    Object.assign(status, await ask("/api/status"), { known: true });
    signOutButton.hidden = !status.principal;
    signOutButton.textContent = `Sign ${status.principal} out`;
    const up = status.engines.filter(isUp);
    line.replaceChildren(...(status.fleet ? [fleetChip()] : up.length ? up.map(chip) : [h("span", { class: "chip warn" }, "⚠ no engine connected")]));
    for (const listener of listeners) listener();
  } catch {
    // The live connection says so.
  }
  timer = setTimeout(watchStatus, EVERY_MILLISECONDS);
}

const isUp = (engine) => engine.ranks.some((rank) => rank.connected);

/** Part of the rows to be searched that were captured; null before the first. */
function coverage({ rows }) {
  const wanted = (rows.expected ?? 0) - (rows.sampled_out ?? 0);
  return wanted > 0 ? (rows.captured ?? 0) / wanted : null;
}

function chip(engine) {
  const faults = engine.ranks.filter((rank) => rank.fault);
  const gone = engine.ranks.filter((rank) => !rank.connected && sameStart(engine, rank));
  const seen = coverage(engine);
  const share = seen === null ? "" : ` · ${(100 * seen).toFixed(seen > 0.9995 || seen < 0.1 ? 0 : 1)}% captured`;
  const trouble = faults.length ? `capture off: ${faults[0].fault}` : gone.length ? `${gone.length} ranks gone` : "";
  return h("span", { class: trouble ? "chip warn" : "chip", title: "Of the rows that should have been searched, so many were. /metrics has the rest." },
    `${engine.modelName} · engine ${engine.engine}${share}`, trouble && h("b", {}, ` ⚠ ${trouble}`));
}

function fleetChip() {
  return h("span", { class: "chip", title: "What the monitors of a fleet published: findings, and requests that ended." }, "fleet");
}

function sameStart(engine, rank) {
  return engine.ranks.some((other) => other.connected && other.engineInstance === rank.engineInstance);
}

/** What a newcomer should do next; null where an engine is connected. */
export function howToBegin() {
  if (!status.known || status.fleet || status.engines.some(isUp)) return null;
  const gone = status.engines.length > 0;
  return notice("info", gone ? "No engine is connected now" : "No engine is connected yet",
    h("p", {}, "Start one beside this monitor:"),
    h("pre", {}, "stream-monitor vllm MODEL"),
    h("p", {}, "or add to your own vLLM ", code("--worker-cls stream_monitor.engine.worker.StreamWorker"), ". ",
      "If one runs already, its log says whether capture is on; ", code("stream-monitor doctor MODEL"),
      " says what would be captured, and ", code("STREAM_MONITOR_TARGET"), " where it sends it."));
}
