"""The headers of a webhook that the quarantine stores."""

from pointbook_common.shopline_webhooks import select_headers


def test_first_short_value_of_each_shopline_header_is_selected_without_signature() -> None:
    headers = [
        ("Authorization", "Bearer x"),
        ("X-SHOPLINE-WEBHOOK-ID", "w"),
        ("x-shopline-hmac-sha256", "0" * 64),
        ("cookie", "c"),
        ("x-shopline-topic", "customers/update"),
        ("X-Shopline-Topic", "customers/delete"),
        ("x-shopline-shop-domain", "d" * 256),
        ("x-shopline-shop-domain", "d" * 255),
        ("x-shopline-other", "o"),
    ]

    assert select_headers(headers) == (
        ("X-SHOPLINE-WEBHOOK-ID", "w"),
        ("x-shopline-topic", "customers/update"),
        ("x-shopline-shop-domain", "d" * 255),
    )
