import { readFileSync } from "node:fs";
import type { Interceptor, Transport } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { retry } from "./retry.js";

/** How to reach a server. */
export interface Config {
  /** host:port */
  address: string;
  /** Needs caFile: a token is never sent in plain text. */
  token?: string | undefined;
  /** Certificates that sign the server's; without them, calls are in plain text. */
  caFile?: string | undefined;
  /** The certificate of this client and its key, for a token that is bound to it. */
  certFile?: string | undefined;
  keyFile?: string | undefined;
}

/** Returns the settings that the pointbook commands use too. The defaults reach `pointbook dev`. */
export function configFromEnvironment(): Config {
  return {
    address: process.env["POINTBOOK_GRPC_ADDRESS"] || "127.0.0.1:50051",
    token: process.env["POINTBOOK_TOKEN"],
    caFile: process.env["POINTBOOK_SERVER_CA_FILE"],
    certFile: process.env["POINTBOOK_CLIENT_CERT_FILE"],
    keyFile: process.env["POINTBOOK_CLIENT_KEY_FILE"],
  };
}

/** Returns a connection, which connects at its first call. Open one for each process and share it. */
export function connect(config: Config, timeoutMs: number): Transport {
  if (config.token && !config.caFile) {
    throw new Error("a token needs TLS: set POINTBOOK_SERVER_CA_FILE");
  }
  return createGrpcTransport({
    baseUrl: `${config.caFile ? "https" : "http"}://${config.address}`,
    interceptors: config.token ? [retry, bearer(config.token)] : [retry],
    defaultTimeoutMs: timeoutMs,
    // The server closes connections that send pings more often than every 10 s.
    pingIntervalMs: 20_000,
    pingTimeoutMs: 5_000,
    nodeOptions: { ca: read(config.caFile), cert: read(config.certFile), key: read(config.keyFile) },
  });
}

function bearer(token: string): Interceptor {
  return (next) => (request) => {
    request.header.set("authorization", `Bearer ${token}`);
    return next(request);
  };
}

function read(file: string | undefined): Buffer | undefined {
  return file ? readFileSync(file) : undefined;
}
