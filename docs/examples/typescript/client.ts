/** A client of Corral for the terminal: `node client.js "what you want"`. Ctrl-C aborts the run. */
import { randomUUID } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import { pathToFileURL } from "node:url";
import WebSocket from "ws";
// Made from the published contract by `npm run types`.
import type { AgentRunResult, ConnectResult, Event, Events, Methods, Response } from "./protocol.js";

/** An event with its payload's type. There will be new ones: a client lets pass what it does not know. */
export type Named = { [E in keyof Events]: { event: E; payload: Events[E] } }[keyof Events];
export type End = Extract<Named, { event: "agent.completed" | "agent.failed" }>;

export interface Options {
  url: string;
  token: string;
  input: string;
  sessionId?: string;
  onEvent: (event: Named) => void;
  /** Aborts the run. */
  signal?: AbortSignal;
}

/** The socket is gone and the run is not: connect again. */
class Dropped extends Error {}
const FINAL_CLOSE_CODES = new Set([4401, 4409]); // the token is no good; we speak no common version
const MOST_FAILURES = 8;

type Answer<M extends keyof Methods> = (result: Methods[M]["result"]) => void;
/** What outlives a socket. `version` is the stateVersion of the last durable event: the cursor. */
interface State { key: string; failures: number; version: number; run?: AgentRunResult }

/** Start a run and follow it to its end, over as many sockets as it takes. */
export async function run(options: Options): Promise<End> {
  const state: State = { key: randomUUID(), failures: 0, version: 0 };
  for (;;) {
    try {
      return await overOneSocket(options, state);
    } catch (error) {
      if (!(error instanceof Dropped) || ++state.failures > MOST_FAILURES) throw error;
      await sleep(Math.min(5000, 100 * 2 ** state.failures));
    }
  }
}

function overOneSocket({ url, token, input, sessionId, onEvent, signal }: Options, state: State): Promise<End> {
  const socket = new WebSocket(`${url.replace(/^http/, "ws")}/ws`, { handshakeTimeout: 10_000 });
  const waiting = new Map<string, (result: never) => void>();
  let silence: NodeJS.Timeout | undefined;
  let heartbeat = 30_000;

  function request<M extends keyof Methods>(method: M, params: Methods[M]["params"], then: Answer<M>) {
    const id = `r${waiting.size + 1}`;
    waiting.set(id, then);
    socket.send(JSON.stringify({ type: "req", id, method, params }));
  }
  function begin(hello: ConnectResult) {
    state.failures = 0;
    heartbeat = hello.limits.heartbeatMs;
    if (state.run) {
      // Everything after the last event that came, then what happens from now on.
      request("events.subscribe", { sessionId: state.run.sessionId, after: state.version }, abortIfWanted);
    } else {
      // Sent again after a drop, the same key gives the same run, and its events from the beginning.
      request("agent.run", { input, sessionId, idempotencyKey: state.key }, (accepted) => {
        state.run = accepted;
        abortIfWanted();
      });
    }
  }
  function abortIfWanted() {
    if (signal?.aborted && state.run && socket.readyState === WebSocket.OPEN)
      request("agent.abort", { runId: state.run.runId, idempotencyKey: state.key }, () => {});
  }
  function heard() {
    clearTimeout(silence); // the gateway pings; one that is not heard for three heartbeats is gone
    silence = setTimeout(() => socket.terminate(), 3 * heartbeat);
  }
  signal?.addEventListener("abort", abortIfWanted);
  return new Promise<End>((resolve, reject) => {
    socket.on("open", () => {
      request("connect", { client: { name: "typescript-example", version: "1" }, auth: { token } }, begin);
    });
    socket.on("ping", heard);
    socket.on("message", (data) => {
      heard();
      const frame = JSON.parse(String(data)) as Response | Event;
      if (frame.type === "res") {
        if (frame.ok) return waiting.get(frame.id)?.(frame.payload as never);
        const text = `${frame.error?.code}: ${frame.error?.message}`;
        return reject(frame.error?.code === "UNAVAILABLE" ? new Dropped(text) : new Error(text));
      }
      const durable = frame.event !== "agent.delta";
      if (durable && frame.stateVersion <= state.version) return;
      if (durable) state.version = frame.stateVersion;
      const event = frame as Named;
      if (!("runId" in event.payload) || event.payload.runId !== state.run?.runId) return; // not of this run
      onEvent(event);
      if (event.event === "agent.completed" || event.event === "agent.failed") resolve(event);
    });
    socket.on("error", (error) => reject(new Dropped(error.message)));
    socket.on("close", (code, reason) => {
      const text = `closed with ${code} ${reason}`;
      reject(FINAL_CLOSE_CODES.has(code) ? new Error(text) : new Dropped(text));
    });
  }).finally(() => {
    clearTimeout(silence);
    signal?.removeEventListener("abort", abortIfWanted);
    socket.close();
  });
}

/** Prints a run. Offsets count code points, and after a drop the text so far comes again: print what is new. */
function printer(): (event: Named) => void {
  const printed = new Map<string, number>();
  const print = (id: string, offset: number, text: string) => {
    const characters = [...text];
    const done = printed.get(id) ?? 0;
    process.stdout.write(characters.slice(Math.max(0, done - offset)).join(""));
    printed.set(id, Math.max(done, offset + characters.length));
  };
  return ({ event, payload }) => {
    if (event === "agent.delta") print(payload.messageId, payload.offset, payload.delta);
    else if (event === "agent.message") print(payload.messageId, 0, payload.text && `${payload.text}\n`);
    else if (event === "agent.tool_call") console.log(`● ${payload.toolName} ${JSON.stringify(payload.args)}`);
    else if (event === "agent.tool_result") console.log(`  ${payload.status}: ${payload.output.trimEnd()}`);
    else if (event === "approval.required") console.log(`  waits: corral approvals approve ${payload.approvalId}`);
  };
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? "").href) {
  const { CORRAL_URL: url = "http://127.0.0.1:7077", CORRAL_TOKEN: token = "" } = process.env;
  const [input = "list", sessionId] = process.argv.slice(2);
  const aborting = new AbortController();
  process.once("SIGINT", () => aborting.abort());
  const end = await run({ url, token, input, sessionId, onEvent: printer(), signal: aborting.signal });
  console.log(end.event === "agent.completed" ? "completed" : `failed: ${end.payload.code}`);
}
