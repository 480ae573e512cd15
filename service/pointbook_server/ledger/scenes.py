"""The scenes of SHOPLINE's points updates, by direction.

Source: docs/reference/shopline-webhooks.md#scenes.
"""

EXPIRED_SCENE = "POINTS_EXPIRED"
DECREASING_SCENES = frozenset(
    {
        "REDEEM_COUPON_CODE",
        "REDEEM_COUPON",
        "REDEEM_PRODUCTS",
        "REDEEM_FREE_SHIPPING",
        "CASHBACK",
        "MANUALLY_DECREASE",
        "CUSTOMER_IMPORT_DECREASE",
        "POS_DECREASE",
        EXPIRED_SCENE,
    }
)
"""The scenes that SHOPLINE documents as deducting points."""
INCREASING_SCENES = frozenset(
    {
        "FOLLOW_FB",
        "CUSTOMER_IMPORT_INCREASE",
        "FOLLOW_INS",
        "EMAIL_SUBSCRIPTION",
        "ORDER_RETURN",
        "SHARE_FB",
        "DAILY_ATTENDANCE",
        "ENTER_PHONE",
        "SUCCESSFUL_REFERRAL",
        "SUCCESSFUL_REGISTRATION",
        "TOP_REVIEWS",
        "CUSTOMERS_BIRTHDAY",
        "ENTER_BIRTHDAY",
        "MANUALLY_INCREASE",
        "PRODUCT_REVIEWS",
        "LEVEL_MEM_BENEFITS",
        "LOGIN_SUCCESS",
        "PAID_MEM_BENEFITS",
        "SUCCESSFUL_ORDERS",
        "CUSTOMIZED_RULE",
        "REFUND_POINT_BY_EXCHANGE",
    }
)
"""The scenes that SHOPLINE documents as adding points; a scene in neither set has no known direction."""
REFUND_SCENES = frozenset({"ORDER_RETURN", "REFUND_POINT_BY_EXCHANGE"})
"""Increases that refund spent points: these points were earned before, so they do not count as earned again."""
