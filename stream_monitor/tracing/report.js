const starts = [0];
for (const count of trace.masks.counts) starts.push(starts.at(-1) + count);
const config = { responsive: true, displaylogo: false };

/* Of every entry its row, two bytes, then of every entry its column, two, and the square root of its share in 255ths. */
async function unpack() {
  const packed = Uint8Array.from(atob(trace.masks.entries), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const count = starts.at(-1);
  trace.masks.row = new Uint16Array(buffer, 0, count);
  trace.masks.column = new Uint16Array(buffer, 2 * count, count);
  trace.masks.share = new Uint8Array(buffer, 4 * count, count);
}

function fill(grid, index) {
  const { row, column, share } = trace.masks;
  for (let entry = starts[index]; entry < starts[index + 1]; entry++) {
    const cells = grid[row[entry]];
    cells[column[entry]] = Math.max(cells[column[entry]] ?? 0, (share[entry] / 255) ** 2);
  }
}

function drawMasks() {
  const { side, step, heads, tokens } = trace.masks;
  const layer = Number(document.getElementById("layer").value);
  const head = Number(document.getElementById("head").value);
  const grid = Array.from({ length: side }, () => new Array(side).fill(null));
  for (let one = 0; one < heads; one++) {
    if (head === one || head < 0) fill(grid, layer * heads + one);
  }
  const places = middles(side, step);
  const spans = Array.from({ length: side }, (_, cell) => [cell * step, Math.min((cell + 1) * step, tokens) - 1]
    .map((token) => token.toLocaleString("en")).join(" to "));
  const figure = {
    ...shareHeatmap(places, places, grid),
    text: grid.map((row, query) => row.map((share, key) => (share === null ? ""
      : `queries of tokens ${spans[query]}<br>keys of tokens ${spans[key]}<br>${percent(share)}`))),
    hovertemplate: "%{text}<extra></extra>",
  };
  const layout = {
    height: 640, margin: { t: 20 }, plot_bgcolor: "white", ...squareAxes("keys, token", "queries, token"),
  };
  Plotly.react("masks", [figure], layout, config);
}

function fillSelectors() {
  const { layers, heads, receivers } = trace.masks;
  const layer = document.getElementById("layer");
  const head = document.getElementById("head");
  for (let one = 0; one < layers; one++) {
    const window = trace.masks.windows[one];
    layer.add(new Option(window ? `${one} (sees ${window} tokens)` : one, one));
  }
  const nameHeads = () => {
    const chosen = head.value;
    head.replaceChildren(new Option("all, the largest share", -1));
    for (let one = 0; one < heads; one++) {
      const star = receivers.some(([l, h]) => l === Number(layer.value) && h === one) ? " ★" : "";
      head.add(new Option(one + star, one));
    }
    head.value = chosen;
  };
  const [first] = receivers.length ? receivers : [[0, -1]];
  layer.value = first[0];
  nameHeads();
  head.value = first[1];
  layer.onchange = () => { nameHeads(); drawMasks(); };
  head.onchange = drawMasks;
}

const said = (number) => `sentence ${number} (${trace.sentences[number].role}): ${trace.sentences[number].text.trim()}`;
const span = (group) => {
  const first = group * trace.group;
  const last = Math.min(first + trace.group, trace.sentences.length) - 1;
  return first === last ? said(first) : `${said(first)}\n… to ${said(last)}`;
};

function drawSentences() {
  const places = middles(trace.matrix.length, trace.group);
  const figure = {
    ...shareHeatmap(places, places, trace.matrix.map((row) => row.map((share) => share || null))),
    hovertemplate: trace.group > 1 ? "%{customdata:.2%}<extra></extra>" : "%{y} reads %{x}<extra></extra>",
  };
  const layout = {
    height: 640, margin: { t: 20 }, plot_bgcolor: "white", ...squareAxes("sentence that is read", "sentence that reads"),
  };
  Plotly.newPlot("sentences", [figure], layout, config);
  document.getElementById("sentences").on("plotly_hover", ({ points: [point] }) => {
    const [row, column] = point.pointIndex;
    document.getElementById("sentences-said").textContent =
      `${percent(trace.matrix[row][column])} of the attention of\n${span(row)}\nfalls on\n${span(column)}`;
  });
}

function drawAnchors() {
  const colours = { prompt: "#888", reasoning: "#1f77b4", answer: "#2ca02c" };
  const curves = Object.entries(colours).map(([role, color]) => {
    const some = trace.sentences.map((_, number) => number).filter((number) => trace.sentences[number].role === role);
    return {
      type: "scatter", mode: "markers+lines", name: role, connectgaps: false, line: { color, width: 0.7 },
      x: some, y: some.map((number) => trace.scores[number] || null),
      marker: { color, size: some.map((number) => (trace.top.includes(number) ? 11 : 5)) },
      hovertemplate: "sentence %{x}: %{y:.3g}<extra></extra>",
    };
  }).filter((curve) => curve.x.length);
  const layout = {
    height: 380, margin: { t: 20 }, showlegend: true, hovermode: "closest",
    xaxis: { title: { text: "sentence" } }, yaxis: { title: { text: "anchor score" }, type: "log", exponentformat: "power" },
  };
  Plotly.newPlot("anchors", curves, layout, config);
  document.getElementById("anchors").on("plotly_hover", ({ points: [point] }) => {
    document.getElementById("anchors-said").textContent = said(point.x);
  });
}

function drawRoutes() {
  if (!trace.routes) return;
  const { hops, corners, blocks, layers } = trace.routes;
  const strongest = Math.max(...hops.map((hop) => hop.through));
  const edges = hops.toReversed().map((hop) => ({
    type: "scatter", mode: "lines+markers", x: [hop.key_block, hop.query_block], y: [hop.layer, hop.layer + 1],
    showlegend: false, opacity: Math.max(0.1, hop.through / strongest), line: { color: "#1f77b4" }, marker: { size: 5 },
    hovertemplate: `layer ${hop.layer}: block ${hop.query_block} reads block ${hop.key_block}<br>` +
      `share ${percent(hop.weight)}, strongest route through it ${hop.through.toPrecision(3)}<extra></extra>`,
  }));
  const path = {
    type: "scatter", mode: "lines", x: corners[0], y: corners[1], name: "strongest route",
    line: { color: "#d62728", width: 3 }, hoverinfo: "skip", showlegend: true,
  };
  const layout = {
    height: 560, margin: { t: 20 }, hovermode: "closest",
    xaxis: { title: { text: "block" }, range: [-1, blocks] }, yaxis: { title: { text: "layer" }, range: [-0.5, layers + 0.5] },
  };
  Plotly.newPlot("routes", [path, ...edges], layout, config);
}

fillSelectors();
drawSentences();
drawAnchors();
drawRoutes();
unpack().then(drawMasks);
