// The watched heads, and which of them are receiver heads: those that many later sentences use to look at few.
import { colour, CONFIG, hasPlotly, layout, panel } from "./charts.js";
import { h } from "./dom.js";

const HEIGHT = 190;

/** "layer 12 head 3" */
export const headName = (head) => `layer ${head?.layer ?? 0} head ${head?.queryHead ?? 0}`;

export class Heads {
  constructor() {
    this.chart = h("div", { class: "chart", id: "heads", role: "img", "aria-label": "Excess kurtosis of each watched head" });
    this.said = h("p", { class: "note" });
    this.element = panel("Receiver heads",
      "How unevenly each watched head divides its attention among earlier sentences of the output (excess kurtosis).",
      this.chart, this.said);
  }

  /** Whether the trace tells its heads apart. */
  static in(trace) {
    return trace.heads.some((head) => Number.isFinite(head.kurtosis));
  }

  draw(trace) {
    if (!hasPlotly() || !Heads.in(trace)) return;
    const sorted = trace.heads.filter((head) => Number.isFinite(head.kurtosis)).sort((a, b) => b.kurtosis - a.kurtosis);
    this.said.textContent = trace.heads.some((head) => head.receiver) ? "Striped: the receiver heads of the model's profile."
      : "No profile names receiver heads of this model, so all heads count alike; stream-monitor calibrate makes one.";
    const bars = [true, false].map((receiver) => {
      const some = sorted.filter((head) => head.receiver === receiver);
      return {
        type: "bar", name: receiver ? "receiver head" : "other", x: some.map((head) => head.name), y: some.map((head) => head.kurtosis),
        marker: { color: colour(receiver ? "found" : "accent"), pattern: { shape: receiver ? "/" : "" } },
        hovertemplate: "%{x}: %{y:.2f}<extra></extra>",
      };
    }).filter((bar) => bar.x.length);
    const figure = layout({
      height: HEIGHT, showlegend: bars.length > 1, bargap: 0.25, margin: { t: 8, r: 12, b: 24, l: 56 },
      legend: { orientation: "h", y: 1.02, x: 0, yanchor: "bottom" },
      xaxis: { categoryorder: "array", categoryarray: sorted.map((head) => head.name), showticklabels: false, title: { text: `${sorted.length} heads`, standoff: 4 } },
      yaxis: { title: { text: "kurtosis" } },
    });
    window.Plotly.react(this.chart, bars, figure, CONFIG);
  }
}
