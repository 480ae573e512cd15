"""`pointbook webhook`: send a signed webhook to a shim."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from pointbook_cli.command_line import load_settings
from pointbook_cli.exit_codes import EXIT_PROBLEMS

app = typer.Typer(help="Try out a shim.", no_args_is_help=True)


@app.command("send")
def send_webhook(
    file: Annotated[Path | None, typer.Argument(help="A JSON body to send as it is; by default, a sample.")] = None,
    url: Annotated[str, typer.Option(help="The shim's URL; the one of POINTBOOK_HTTP_ADDRESS by default.")] = "",
    base64: Annotated[bool, typer.Option(help="Encode the signature in base64, as SHOPLINE documents it.")] = False,
    merchant: Annotated[str, typer.Option(help="The merchant's id.")] = "2000001234",
    store: Annotated[str, typer.Option(help="The store's id.")] = "1718263946864",
    buyer: Annotated[str, typer.Option(help="The customer's id.")] = "2404721679",
    update_type: Annotated[str, typer.Option("--type", help="INCREASE or DECREASE.")] = "INCREASE",
    scene: Annotated[str, typer.Option(help="The reason of the change.")] = "SUCCESSFUL_REGISTRATION",
    value: Annotated[int, typer.Option(help="The number of points.")] = 20,
    balance: Annotated[int, typer.Option(help="The balance after the change.")] = 20,
    updated_at: Annotated[int, typer.Option(help="The time, in milliseconds since 1970.")] = 1721829526566,
) -> None:
    """Sign a points webhook and send it.

    Sending the sample again sends the same event. The signature's secret is the first one of
    POINTBOOK_SHOPLINE_SECRETS, or that of `pointbook dev`. It is not an option, because process lists show the command
    line.
    """
    from pointbook_cli.sample_webhook import DEV_SECRET, Delivery, send
    from shopline_shim.settings import ShimSettings

    settings = load_settings(ShimSettings)
    scheme = "https" if settings.http_tls_cert_file else "http"
    url = url or f"{scheme}://{settings.http_address}/webhooks/shopline"
    secret = settings.shopline_secrets[0].get_secret_value() if settings.shopline_secrets else DEV_SECRET
    sample = {
        "buyer_id": buyer,
        "points_balance": balance,
        "points_expiry_time": "",
        "store_id": store,
        "update_type": update_type,
        "updated_at": updated_at,
        "updated_scene": scene,
        "updated_value": value,
    }
    body = file.read_bytes() if file else json.dumps(sample).encode()
    delivery = Delivery(merchant_id=merchant, store_id=store, secret=secret, base64=base64)
    status, response = send(url, body, delivery)
    typer.echo(f"{status} {response}")
    if status != 200:  # noqa: PLR2004 - the only status that SHOPLINE accepts as received
        sys.exit(EXIT_PROBLEMS)
