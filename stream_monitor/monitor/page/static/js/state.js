// How far a request has come, in words and signs.
import { plain } from "./api.js";
import { h } from "./dom.js";

const SIGNS = { running: "● running", finished: "✓ finished", cut: "✂ cut off" };
const MEANINGS = { cut: "the monitor ended, or made room, while it ran: what came later is missing" };

/** running, finished or cut */
export const stateOf = (info) => plain(info.state, "REQUEST_STATE_");

export function stateSign(info) {
  const name = stateOf(info);
  const late = info.joinedLate ? h("span", { class: "state warn", title: "the monitor did not see it start" }, " ⚠ joined late") : null;
  return [h("span", { class: `state ${name}`, title: MEANINGS[name] }, SIGNS[name] ?? name), late];
}
