"""A checkout: validate, send a one-time code, redeem, reverse and list.

Start `pointbook dev` first, and give the buyer points with `pointbook webhook send --buyer ID`.
"""

import argparse
import asyncio
import os
import sys

from pointbook_client import (
    Buyer,
    CustomerRef,
    FailedPreconditionError,
    InvalidArgumentError,
    PendingCall,
    PointbookClient,
    PointbookError,
    Redemption,
    Tls,
    connect,
)

SEND_AGAIN_SECONDS = 1.0


async def main() -> int:
    """Run the checkout, and return the exit code."""
    options = read_options()
    tls = Tls(ca_file=options.ca_file) if options.ca_file else None
    try:
        async with connect(
            options.address, token=os.environ.get("POINTBOOK_TOKEN", ""), tls=tls, timeout=options.timeout
        ) as pointbook:
            await check_out(pointbook, options)
    except InvalidArgumentError as error:
        for violation in error.violations:
            print(f"wrong field {violation.field}: {violation.description}", file=sys.stderr)
    except FailedPreconditionError as error:
        print(f"refused: {error.reason}: {error.message}", file=sys.stderr)
    except PointbookError as error:
        print(f"failed: {error}", file=sys.stderr)
    else:
        return 0
    return 1


async def check_out(pointbook: PointbookClient, options: argparse.Namespace) -> None:
    """Redeem points of a customer, and reverse them."""
    customer = CustomerRef(options.merchant, buyer=Buyer(options.store, options.buyer))
    validation = await pointbook.validate(customer, options.program, options.points)
    if not validation.redeemable:
        for violation in validation.violations:
            print(f"no: {violation.code} {violation.reason}: {violation.message}")
        return
    print(f"redeemable: {validation.points} points, worth {validation.redeem_value}")

    issued = await pointbook.issue_code(customer, options.program, options.points)
    print(f"code sent: challenge {issued.challenge_id}, valid until {issued.expire_time:%H:%M:%S} UTC")
    code = await asyncio.to_thread(input, "The code that the customer says: ")

    # The reference is made before anything is sent: a till stores it with the order.
    call = pointbook.redeem(
        customer, options.program, options.points, validation_code=code, challenge_id=issued.challenge_id
    )
    print(f"reference: {call.reference}")
    redemption = await send_until_known(call)
    print(f"redeemed: {redemption.redemption_id}, {redemption.points} points, {redemption.active_points} left")

    reversal = pointbook.reverse(options.merchant, redeemed_reference=call.reference, notes="The order was cancelled.")
    reversed_redemption = await send_until_known(reversal)
    print(f"reversed: {reversed_redemption.reversed_points} points")

    async for listed in pointbook.list_redemptions(options.merchant, customer=customer):
        print(f"listed: {listed.redemption_id} {listed.state} {listed.points} points")


async def send_until_known(call: PendingCall[Redemption]) -> Redemption:
    """Send a call until the server says what became of it.

    The client repeats most failures itself. This is for outages that are longer than its deadline.
    """
    while True:
        try:
            return await call.send()
        except PointbookError as error:
            if not error.outcome_unknown:
                raise
            print(f"no answer yet: {error}", file=sys.stderr)
            await asyncio.sleep(SEND_AGAIN_SECONDS)


def read_options() -> argparse.Namespace:
    """Return the options of the command line; their defaults are those of `pointbook dev`."""
    parser = argparse.ArgumentParser(description="Redeem points of a customer, and reverse them.")
    parser.add_argument("buyer", help="SHOPLINE's id of the customer")
    parser.add_argument("--points", type=int, default=10)
    parser.add_argument("--address", default="127.0.0.1:50051")
    parser.add_argument("--timeout", type=float, default=20.0, help="the deadline of each call, in seconds")
    parser.add_argument("--ca-file", help="the CA of the server's certificate, in PEM")
    parser.add_argument("--merchant", default="2000001234")
    parser.add_argument("--store", default="1718263946864")
    parser.add_argument("--program", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
