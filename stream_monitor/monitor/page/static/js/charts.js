// What the charts share: Plotly if the monitor has it, and colours that follow the page's theme.
import { h } from "./dom.js";

export const CONFIG = { displayModeBar: false, displaylogo: false, responsive: true, doubleClick: "reset" };

export const hasPlotly = () => typeof window.Plotly !== "undefined";

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
export const roleColour = (role) => css(`--role-${role}`) || css("--muted");
export const colour = (name) => css(`--${name}`);

/** Layout for a chart on the page's background. */
export function layout(more) {
  const [text, line] = [css("--text"), css("--line")];
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line };
  const { xaxis, yaxis, ...rest } = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: text, family: "system-ui, sans-serif", size: 12 },
    margin: { t: 8, r: 12, b: 40, l: 56 },
    hoverlabel: { bgcolor: css("--panel"), bordercolor: line, font: { color: text, size: 12 } },
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
  };
}

/** A panel with a heading, a line that explains it, and room for a chart. */
export function panel(title, explained, chart, ...after) {
  return h("section", { class: "panel" }, h("h2", {}, title), h("p", { class: "note" }, explained),
    hasPlotly() ? chart : h("p", { class: "notice warning" },
      "Charts need the package plotly where the monitor runs: pip install 'stream-monitor[page]'. The sentences beside show the same numbers."),
    ...after);
}
