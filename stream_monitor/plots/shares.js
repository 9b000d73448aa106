// Attention shares, in words and as a heat map of Plotly's. A module: the report of a trace carries it inline.

/** Shares below this look like it: a tenth of a percent is as good as nothing. */
export const FLOOR = 1e-3;

export const percent = (share) => (share >= 0.9995 ? "100%" : `${(100 * share).toPrecision(share < FLOOR ? 2 : 3)}%`);

/** Middles of `count` cells on an axis of the things they stand for, `step` each from number `origin` on. */
export const middles = (count, step, origin = 0) => Array.from({ length: count }, (_, cell) => origin + cell * step + (step - 1) / 2);

/** Trace of a heat map. `shares`: rows of shares, null where there is none; their colour is logarithmic. */
export function shareHeatmap(x, y, shares) {
  return {
    type: "heatmap", x, y, zmin: Math.log10(FLOOR), zmax: 0, colorscale: "Viridis", hoverongaps: false, customdata: shares,
    colorbar: { tickvals: [-3, -2, -1, 0], ticktext: ["≤0.1%", "1%", "10%", "100%"], outlinewidth: 0, thickness: 12 },
    z: shares.map((row) => row.map((share) => (share === null ? null : Math.log10(Math.max(share, FLOOR))))),
  };
}

/** Layout of both axes, so that cells are square and the first row is at the top. */
export function squareAxes(xTitle, yTitle) {
  return {
    xaxis: { title: { text: xTitle }, constrain: "domain" },
    yaxis: { title: { text: yTitle }, autorange: "reversed", scaleanchor: "x", constrain: "domain" },
  };
}
