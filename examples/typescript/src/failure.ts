import { Code, ConnectError } from "@connectrpc/connect";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "../gen/google/rpc/error_details_pb.js";

/** Why a call failed, with all details of the error. */
export interface Failure {
  readonly code: Code;
  /** An ErrorReason without its prefix; empty if the server did not answer. */
  readonly reason: string;
  /** For developers: do not parse it. */
  readonly message: string;
  /** The values that the reason refers to. */
  readonly metadata: Readonly<Record<string, string>>;
  /** The wrong fields of the request. */
  readonly violations: readonly { readonly field: string; readonly description: string }[];
  /** The delay before a retry can help; 0 if there is none. */
  readonly retryDelayMs: number;
  /** What the server's log calls the call. */
  readonly requestId: string;
}

/** Returns the failure of a call from what it threw. */
export function failureOf(thrown: unknown): Failure {
  const error = ConnectError.from(thrown);
  const [info] = error.findDetails(ErrorInfoSchema);
  const [retry] = error.findDetails(RetryInfoSchema);
  const { seconds = 0n, nanos = 0 } = retry?.retryDelay ?? {};
  return {
    code: error.code,
    reason: info?.reason ?? "",
    message: error.rawMessage,
    metadata: info?.metadata ?? {},
    violations: error.findDetails(BadRequestSchema).flatMap((detail) => detail.fieldViolations),
    retryDelayMs: Number(seconds) * 1_000 + nanos / 1_000_000,
    requestId: error.metadata.get("x-request-id") ?? "",
  };
}

/** Returns everything that a log needs, a line for each wrong field. */
export function describe(failure: Failure): string {
  const values = Object.entries(failure.metadata).sort();
  return [
    `${failure.reason || Code[failure.code]}: ${failure.message}`,
    ...values.map(([name, value]) => ` ${name}=${value}`),
    failure.retryDelayMs > 0 ? ` (retry after ${failure.retryDelayMs / 1_000}s)` : "",
    failure.requestId && ` (request ${failure.requestId})`,
    ...failure.violations.map(({ field, description }) => `\n  ${field}: ${description}`),
  ].join("");
}

/**
 * Returns whether the server may have done what the call asked for, although its answer was lost: repeat the call with
 * the same reference.
 */
export function isOutcomeUnknown({ code, reason }: Failure): boolean {
  return reason === "" || code === Code.Unavailable || code === Code.DeadlineExceeded;
}
