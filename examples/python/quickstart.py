"""Redeem points and reverse them, although the server is killed in between."""

import asyncio
import sys

from pointbook_client import Buyer, CustomerRef, connect

MERCHANT_ID, STORE_ID = "2000001234", "1718263946864"


async def main(buyer_id: str) -> None:
    """Redeem and reverse 10 points of a buyer."""
    customer = CustomerRef(MERCHANT_ID, buyer=Buyer(STORE_ID, buyer_id))
    async with connect("127.0.0.1:50051") as pointbook:
        call = pointbook.redeem(customer, program_id=1, points=10)
        print("reference", call.reference)  # Store it: the same reference never redeems twice.
        print("redeemed", (await call).redemption_id)
        await asyncio.to_thread(input, "Kill the server, start it again, and press Enter: ")
        print("the same", (await call.send()).redemption_id)
        reversal = pointbook.reverse(MERCHANT_ID, redeemed_reference=call.reference)
        print("reversed", (await reversal).reversed_points)


asyncio.run(main(sys.argv[1]))
