// The sentence matrix as a heat map: long traces in coarser cells, exact ones where the reader looks closer.
import { colour, CONFIG, hasPlotly, layout, panel } from "./charts.js";
import { h, words } from "./dom.js";
import { middles, percent, shareHeatmap, squareAxes } from "./shares.js";

const HEIGHT = 440;
const SIDE = 200;
const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

export class HeatMap {
  #trace = null;
  #view = null;
  #cell = null;
  #cells = null;

  /** `onpick(sentence)`: the reader chose the sentence that reads. */
  constructor(onpick) {
    this.onpick = onpick;
    this.chart = h("div", { class: "chart", id: "heatmap", tabindex: 0, role: "application",
      "aria-label": "Sentence heat map. Arrow keys move from cell to cell, Enter selects the sentence that reads", "aria-describedby": "cell" });
    this.said = h("p", { class: "said", id: "cell", "aria-live": "polite" }, "Point at a cell, or move with the arrow keys.");
    this.step = h("p", { class: "note" });
    this.element = panel("Which sentence reads which",
      "A row is a sentence that reads, a column one that is read; the colour is the share of its attention. Drag to look closer, double-click to go back.",
      this.chart, this.step, this.said);
    this.chart.addEventListener("keydown", (event) => this.#key(event));
  }

  draw(trace) {
    this.#trace = trace;
    if (!hasPlotly() || !trace.size) return;
    const all = [0, trace.size];
    const [rows, columns] = this.#view ?? [all, all];
    const { step, shares, pairs } = this.#cells = trace.cells(rows, columns, SIDE);
    this.#cells.origin = [rows[0], columns[0]];
    const y = middles(shares.length, step, rows[0]);
    const x = middles(shares[0]?.length ?? 0, step, columns[0]);
    const figure = {
      ...shareHeatmap(x, y, shares),
      hovertemplate: step > 1 ? "%{customdata:.2%}<extra></extra>" : "%{y} reads %{x}: %{customdata:.2%}<extra></extra>",
    };
    const { xaxis, yaxis } = squareAxes("sentence that is read", "sentence that reads");
    const bare = { showgrid: false, zeroline: false };
    const range = ([from, to]) => [from - 0.5, to - 0.5];
    window.Plotly.react(this.chart, [figure], layout({
      height: HEIGHT, margin: { t: 4, r: 8, b: 40, l: 56 },
      xaxis: { ...xaxis, ...bare, range: range(columns) },
      yaxis: { ...yaxis, ...bare, autorange: false, range: range(rows).reverse() },
      shapes: this.#outline(),
    }), CONFIG);
    this.step.textContent = step > 1 ? `Each cell stands for ${step} by ${step} sentences and shows their largest share.` : "";
    if (!this.wired) this.#wire();
  }

  #wire() {
    this.wired = true;
    this.chart.on("plotly_hover", ({ points: [point] }) => this.#say(point.pointIndex));
    this.chart.on("plotly_click", ({ points: [point] }) => this.#pick(point.pointIndex));
    this.chart.on("plotly_relayout", (change) => this.#zoomed(change));
  }

  #zoomed(change) {
    if (change["xaxis.autorange"] || change["yaxis.autorange"]) {
      this.#view = null;
    } else {
      const axis = (name) => [change[`${name}.range[0]`] ?? change[`${name}.range`]?.[0], change[`${name}.range[1]`] ?? change[`${name}.range`]?.[1]];
      const [x, y] = [axis("xaxis"), axis("yaxis")];
      if (x[0] === undefined && y[0] === undefined) return;
      const size = this.#trace.size;
      const inside = ([a, b], held) => (a === undefined ? held
        : [Math.max(0, Math.ceil(Math.min(a, b))), Math.min(size, Math.floor(Math.max(a, b)) + 1)]);
      const [rows, columns] = this.#view ?? [[0, size], [0, size]];
      const next = [inside(y, rows), inside(x, columns)];
      if (next.some(([from, to]) => to - from < 2) || JSON.stringify(next) === JSON.stringify(this.#view)) return;
      this.#view = next;
    }
    this.#cell = null;
    this.draw(this.#trace);
  }

  /** The pair behind a cell: of the sentences it stands for, those with the largest share. */
  #pair([y, x]) {
    const { pairs, step, origin } = this.#cells;
    return pairs[y]?.[x] ?? [origin[0] + y * step, origin[1] + x * step];
  }

  #pick(cell) {
    this.onpick(this.#pair(cell)[0]);
  }

  #say(cell) {
    const [row, column] = this.#pair(cell);
    const [reads, read] = [row, column].map((index) => this.#trace.sentences[index]);
    if (!reads || !read) return;
    const share = this.#trace.share(row, column);
    this.said.replaceChildren(
      h("b", {}, percent(share)), ` of the attention of sentence ${row} (${reads.role}) is on sentence ${column} (${read.role})`,
      reads.text ? [h("br"), h("q", {}, words(reads.text)), " reads ", h("q", {}, words(read.text))] : null);
    this.said.dataset.share = share;
  }

  #key(event) {
    const { shares } = this.#cells ?? {};
    if (!shares?.length) return;
    const move = MOVES[event.key];
    if (event.key === "Enter" && this.#cell) this.#pick(this.#cell);
    if (event.key === "Escape" && this.#view) this.#zoomed({ "xaxis.autorange": true });
    if (!move) return;
    event.preventDefault();
    const last = [shares.length - 1, shares[0].length - 1];
    this.#cell = (this.#cell ?? last).map((at, axis) => Math.min(last[axis], Math.max(0, at + (this.#cell ? move[axis] : 0))));
    this.#say(this.#cell);
    window.Plotly.relayout(this.chart, { shapes: this.#outline() });
  }

  #outline() {
    if (!this.#cell) return [];
    const { step, origin } = this.#cells;
    const [y, x] = this.#cell.map((at, axis) => origin[axis] + at * step - 0.5);
    return [{ type: "rect", x0: x, x1: x + step, y0: y, y1: y + step, line: { color: colour("found"), width: 2 } }];
  }
}
