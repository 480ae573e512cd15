import { setTimeout } from "node:timers/promises";
import { Code, ConnectError, type Interceptor } from "@connectrpc/connect";

const FIRST_BACKOFF_MS = 100;
const BACKOFF_MS_MAX = 2_000;
/** Codes of refusals that may pass. Connections that break end calls with Aborted or Canceled. */
const RETRYABLE = new Set([Code.Unavailable, Code.ResourceExhausted, Code.Aborted, Code.Canceled]);

/** Repeats calls that failed for a moment, as long as the server wants it and the deadline allows it. */
export const retry: Interceptor = (next) => async (request) => {
  const deadline = Date.now() + timeoutMs(request.header);
  for (let backoff = FIRST_BACKOFF_MS; ; backoff = Math.min(2 * backoff, BACKOFF_MS_MAX)) {
    try {
      return await next(request);
    } catch (reason) {
      const error = ConnectError.from(reason);
      const delay = pushbackMs(error) ?? backoff * (0.8 + 0.4 * Math.random());
      const remaining = deadline - Date.now() - delay;
      // The signal is aborted when the deadline passes, and when the caller cancels.
      if (request.stream || request.signal.aborted || !RETRYABLE.has(error.code) || delay < 0 || remaining <= 0) {
        throw error;
      }
      await setTimeout(delay, undefined, { signal: request.signal });
      request.header.set("grpc-timeout", `${Math.ceil(remaining)}m`);
    }
  }
};

/** Returns how long the server wants the client to wait: negative for never, undefined if it does not say. */
function pushbackMs(error: ConnectError): number | undefined {
  const value = error.metadata.get("grpc-retry-pushback-ms");
  return value === null ? undefined : /^\d+$/.test(value) ? Number(value) : -1;
}

/** Returns the timeout of a call, which Connect sends in milliseconds. */
function timeoutMs(header: Headers): number {
  return Number.parseInt(header.get("grpc-timeout") ?? "", 10) || 0;
}
