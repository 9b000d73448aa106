// The anchor curve: how much later sentences read each sentence, and where on the way findings were raised.
import { kindOf, KINDS } from "./api.js";
import { colour, CONFIG, hasPlotly, layout, panel, roleColour } from "./charts.js";
import { h } from "./dom.js";

const HEIGHT = 230;
const LOWEST = 1e-4;
const CURVES = { all: "all watched heads", receiver: "receiver heads, output only", corrected: "the same, corrected for nearness" };
const SYMBOLS = { system: "square", user: "circle", untrusted: "triangle-up", assistant: "diamond", reasoning: "circle", answer: "star", unknown: "circle-open" };

export class Curve {
  /** `onpick(sentence)`: the reader chose a sentence. */
  constructor(onpick) {
    this.onpick = onpick;
    this.chart = h("div", { class: "chart", id: "curve", role: "img", "aria-label": "Anchor score of each sentence; the list of sentences has the same numbers" });
    this.element = panel("Anchor curve",
      "What share of their attention later sentences give each one, on average. High points are anchors; marks at the top are findings.",
      this.chart);
    const options = Object.entries(CURVES).map(([value, text]) => h("option", { value }, text));
    this.select = h("select", { "aria-label": "Anchor score by", onchange: () => this.draw(...this.drawn) }, options);
    this.choice = h("label", { class: "follow" }, "by ", this.select);
    this.element.querySelector("h2").append(this.choice);
  }

  draw(trace, selected) {
    this.drawn = [trace, selected];
    this.choice.hidden = !trace.curves.receiver.length;
    if (!hasPlotly()) return;
    const scores = Array.from(trace.curves[this.select.value], (score) => (score > 0 ? score : null));
    const lowest = Math.max(LOWEST, Math.min(0.01, ...scores.filter((score) => score !== null)));
    const top = Math.max(1, ...scores.filter((score) => score !== null));
    const roles = [...new Set(trace.sentences.map((sentence) => sentence.role))];
    const line = {
      type: "scatter", mode: "lines", x: scores.map((_, index) => index), y: scores, showlegend: false,
      line: { color: colour("muted"), width: 1 }, hoverinfo: "skip", connectgaps: false,
    };
    const points = roles.map((role) => {
      const some = trace.sentences.filter((sentence) => sentence.role === role).map((sentence) => sentence.index);
      return {
        type: "scatter", mode: "markers", name: role, x: some, y: some.map((index) => scores[index]),
        marker: { color: roleColour(role), symbol: SYMBOLS[role] ?? "circle", size: trace.size > 300 ? 5 : 8 },
        hovertemplate: `sentence %{x} (${role}): %{y:.3g}<extra></extra>`,
      };
    });
    const figure = layout({
      height: HEIGHT, hovermode: "closest", showlegend: true, uirevision: "kept",
      legend: { orientation: "h", y: 1.02, x: 0, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" }, margin: { t: 26, r: 12, b: 36, l: 56 },
      xaxis: { title: { text: "sentence", standoff: 6 }, range: [-0.02 * trace.size - 0.5, 1.02 * trace.size] },
      yaxis: { title: { text: "anchor score" }, type: "log", exponentformat: "power", dtick: 1, range: [Math.log10(lowest) - 0.1, Math.log10(top) + 0.2] },
      shapes: [...trace.events.map((event) => upright(at(event), colour("found"), "dot")),
        ...(selected === null ? [] : [upright(selected, colour("accent"), "solid")])],
    });
    window.Plotly.react(this.chart, [line, ...points, ...findings(trace, top)], figure, CONFIG);
    if (!this.wired) {
      this.wired = true;
      this.chart.on("plotly_click", ({ points: [point] }) => this.onpick(point.x));
    }
  }
}

const at = (event) => event.sentence?.index ?? 0;

/** One trace of marks at height `top` for each kind of finding. */
function findings(trace, top) {
  return Object.entries(KINDS).map(([kind, { name, symbol }]) => {
    const some = trace.events.filter((event) => kindOf(event) === kind);
    // Those of one sentence stand below each other.
    const above = (event) => trace.events.filter((other) => at(other) === at(event) && kindOf(other) < kind).length;
    return {
      type: "scatter", mode: "markers", name, x: some.map(at), y: some.map((event) => top / 3 ** above(event)),
      marker: { symbol, size: 12, color: colour("found"), line: { color: colour("panel"), width: 1 } },
      text: some.map((event) => wrapped(event.summary)), hovertemplate: "%{text}<extra></extra>",
    };
  }).filter((one) => one.x.length);
}

/** A text for Plotly's labels, which read some markup: none is left in it. */
function wrapped(text) {
  const safe = (text ?? "").replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  return safe.replace(/(.{50,70}) /g, "$1<br>");
}

function upright(x, line, dash) {
  return { type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: { color: line, width: 1, dash }, layer: "below" };
}
