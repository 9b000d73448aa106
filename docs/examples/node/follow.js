// Prints findings as JSON lines and goes on after them when the connection breaks or the monitor starts anew.
//
//     npm install --no-package-lock
//     node follow.js [ADDRESS] [CURSOR]

import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const PROTOS = fileURLToPath(new URL("../../../protos", import.meta.url));
const [address = "127.0.0.1:9750", startCursor = ""] = process.argv.slice(2);

const definition = loadSync("stream_monitor/v1alpha1/monitor.proto", {
  includeDirs: [PROTOS],
  keepCase: true,
  longs: String,
  enums: String,
  defaults: true,
  oneofs: true,
});
const { MonitorService } = grpc.loadPackageDefinition(definition).stream_monitor.v1alpha1;
// Answers that trying again does not change.
const FINAL = [
  grpc.status.INVALID_ARGUMENT,
  grpc.status.UNIMPLEMENTED,
  grpc.status.PERMISSION_DENIED,
  grpc.status.UNAUTHENTICATED,
];

// One subscription, from a cursor on; resolves to the error it ended with.
function follow(client, cursor, heard) {
  return new Promise((resolve) => {
    const call = client.Subscribe({ cursor });
    call.on("data", heard);
    call.on("error", resolve);
    call.on("end", () => resolve({ code: grpc.status.UNAVAILABLE, details: "the stream ended" }));
  });
}

const client = new MonitorService(address, grpc.credentials.createInsecure(), {
  // How a connection that died in silence is noticed.
  "grpc.keepalive_time_ms": 30_000,
  "grpc.initial_reconnect_backoff_ms": 200,
  "grpc.max_reconnect_backoff_ms": 5_000,
});
let cursor = startCursor;
let attempt = 0;
for (;;) {
  const error = await follow(client, cursor, (response) => {
    attempt = 0;
    cursor = response.cursor;
    if (!response.event) {
      console.error(`subscribed at ${cursor}`);
      return;
    }
    const { kind, external_id: externalId, summary } = response.event;
    console.log(JSON.stringify({ kind, externalId, summary, lost: Number(response.lost), cursor }));
  });
  if (FINAL.includes(error.code)) {
    console.error(error.details);
    process.exit(1);
  }
  if (error.code === grpc.status.OUT_OF_RANGE) {
    // The monitor does not know the cursor any more: go on from the oldest it has, and say that events are missing.
    const [oldest = ""] = error.metadata.get("oldest-cursor");
    console.error(`events are missing: ${error.details}`);
    cursor = cursor === oldest ? "" : oldest;
    continue;
  }
  if (attempt === 0) console.error(`no answer (${error.details}); trying again`);
  const longest = Math.min(5_000, 200 * 2 ** attempt++);
  await sleep(longest * (0.5 + Math.random() / 2));
}
