/** Redeems points at a till: validation, one-time code, redemption, reversal, and the customer's list. */
import { randomUUID } from "node:crypto";
import { createInterface } from "node:readline/promises";
import { parseArgs } from "node:util";
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { type Client, ConnectError, createClient } from "@connectrpc/connect";
import { type CustomerRef, CustomerRefSchema } from "../gen/pointbook/v1/identity_pb.js";
import {
  type IssuedCode,
  type RedeemPointsRequestSchema,
  type Redemption,
  RedemptionService,
  RedemptionState,
} from "../gen/pointbook/v1/redemption_pb.js";
import { configFromEnvironment, connect } from "./connection.js";
import { describe, failureOf, isOutcomeUnknown } from "./failure.js";

/** How often a redemption is sent, each time with the same reference, until its outcome is known. */
const REDEEM_ATTEMPTS = 3;

class Till {
  constructor(
    private readonly client: Client<typeof RedemptionService>,
    private readonly customer: CustomerRef,
    private readonly programId: bigint,
    private readonly points: bigint,
  ) {}

  /** Redeems points for an order, a new one without it, and gives them back. */
  async checkOut(order: string | undefined, pageSize: number): Promise<void> {
    const redemption = (order && (await this.find(order))) || (await this.redeemWithCode(order));
    console.log(`redeemed ${redemption.points} points as ${redemption.redemptionId}: ${stateName(redemption)}`);
    const reversed = await this.reverse(redemption.externalReferenceNumber);
    console.log(`reversed ${reversed.reversedPoints} points: ${stateName(reversed)}`);
    for await (const each of this.redemptions(pageSize)) {
      console.log(`${each.redemptionId} ${each.points} points ${stateName(each)} ${each.externalReferenceNumber}`);
    }
  }

  /** Returns the redemption of an order, or undefined if there is none. */
  private async find(order: string): Promise<Redemption | undefined> {
    try {
      const response = await this.client.getRedemption({
        merchantId: this.customer.merchantId,
        redemption: { case: "externalReferenceNumber", value: order },
      });
      return response.redemption;
    } catch (thrown) {
      if (failureOf(thrown).reason === "REDEMPTION_NOT_FOUND") {
        return undefined;
      }
      throw thrown;
    }
  }

  private async redeemWithCode(order = `order-${randomUUID()}`): Promise<Redemption> {
    await this.validate();
    const { challengeId } = await this.issueCode();
    const validationCode = await ask("code that the customer says: ");
    // A till stores the reference before it sends it, so that it can repeat the call even after a crash of its own.
    console.log(`redeeming as ${order}; after a crash, go on with --order ${order}`);
    const { customer, programId, points } = this;
    const externalReferenceNumber = order;
    return this.redeem({ customer, programId, points, validationCode, challengeId, externalReferenceNumber });
  }

  /** Asks whether the points may be redeemed. A "no" is an answer, not an error of the call. */
  private async validate(): Promise<void> {
    const { customer, programId, points } = this;
    const answer = await this.client.validateRedemption({ customer, programId, points });
    for (const { code, reason, message } of answer.violations) {
      console.log(`${code} ${reason}: ${message}`);
    }
    if (!answer.redeemable) {
      throw new Error("the points cannot be redeemed");
    }
    console.log(`${points} of ${answer.activePoints} points may be redeemed, worth ${answer.redeemLocalValue}`);
  }

  /** Sends the customer a code for exactly this program and amount. */
  private async issueCode(): Promise<IssuedCode> {
    const { customer, programId, points } = this;
    const { issuedCode } = await this.client.issueValidationCode({ customer, programId, points });
    const issued = present(issuedCode);
    console.log(`code sent, challenge ${issued.challengeId}`);
    return issued;
  }

  /** Redeems once, however often the request is sent, because its reference stays the same. */
  private async redeem(request: MessageInitShape<typeof RedeemPointsRequestSchema>): Promise<Redemption> {
    for (let attempt = 1; ; attempt++) {
      try {
        const { redemption } = await this.client.redeemPoints(request);
        return present(redemption);
      } catch (thrown) {
        const failure = failureOf(thrown);
        if (!isOutcomeUnknown(failure) || attempt === REDEEM_ATTEMPTS) {
          throw thrown;
        }
        console.log(`no answer, repeating ${request.externalReferenceNumber}: ${describe(failure)}`);
      }
    }
  }

  /** Gives the points of an order back. Its reference follows from the order, so that it can be repeated too. */
  private async reverse(order: string): Promise<Redemption> {
    const { redemption } = await this.client.reverseRedemption({
      merchantId: this.customer.merchantId,
      redemption: { case: "redeemedReferenceNumber", value: order },
      externalReferenceNumber: `reverse-${order}`,
    });
    return present(redemption);
  }

  /** Yields all redemptions of the customer, newest first. */
  private async *redemptions(pageSize: number): AsyncGenerator<Redemption> {
    const { customer } = this;
    let pageToken = "";
    do {
      const { merchantId } = customer;
      const page = await this.client.listRedemptions({ merchantId, customer, pageSize, pageToken });
      yield* page.redemptions;
      pageToken = page.nextPageToken;
    } while (pageToken !== "");
  }
}

/** Returns a field that the server always sets. */
function present<T>(value: T | undefined): T {
  if (value === undefined) {
    throw new Error("the response lacks a field");
  }
  return value;
}

function stateName(redemption: Redemption): string {
  return RedemptionState[redemption.state];
}

async function ask(question: string): Promise<string> {
  const terminal = createInterface({ input: process.stdin, output: process.stdout });
  try {
    return (await terminal.question(question)).trim();
  } finally {
    terminal.close();
  }
}

function explain(thrown: unknown): string {
  if (thrown instanceof ConnectError) {
    return describe(failureOf(thrown));
  }
  return thrown instanceof Error ? thrown.message : String(thrown);
}

async function main(): Promise<void> {
  const config = configFromEnvironment();
  const { values } = parseArgs({
    options: {
      address: { type: "string", default: config.address },
      ca: { type: "string" },
      merchant: { type: "string", default: "2000001234" },
      store: { type: "string", default: "1718263946864" },
      buyer: { type: "string", default: "2404721679" },
      program: { type: "string", default: "1" },
      points: { type: "string", default: "10" },
      order: { type: "string" },
      "page-size": { type: "string", default: "0" },
      "timeout-ms": { type: "string", default: "10000" },
    },
  });
  const { address, ca: caFile = config.caFile } = values;
  const transport = connect({ ...config, address, caFile }, Number(values["timeout-ms"]));
  const customer = create(CustomerRefSchema, {
    merchantId: values.merchant,
    identifier: { case: "buyer", value: { storeId: values.store, buyerId: values.buyer } },
  });
  const client = createClient(RedemptionService, transport);
  const till = new Till(client, customer, BigInt(values.program), BigInt(values.points));
  await till.checkOut(values.order, Number(values["page-size"]));
}

try {
  await main();
} catch (thrown) {
  console.error(explain(thrown));
  process.exitCode = 1;
}
