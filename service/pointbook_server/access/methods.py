"""The scope of every method, and where its request names merchants.

A method that is not listed is refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pointbook_server.access.model import Scope


@dataclass(frozen=True, slots=True)
class MethodAccess:
    """The scope of a method, and the paths of merchants in its request.

    A method without a scope is about its caller alone: any valid token may call it, and its request names no merchant.
    """

    scope: Scope | None
    merchant_path: str = "merchant_id"
    further_merchant_paths: tuple[str, ...] = ()
    for_all_merchants: bool = False
    """Whether the token must be for all merchants, no matter which merchant the request names."""


METHODS = {
    "AccessService/GetCallerAccess": MethodAccess(None),
    "PointsService/ApplyPointsUpdate": MethodAccess(Scope.POINTS_WRITE, "update.merchant_id"),
    "PointsService/BatchApplyPointsUpdates": MethodAccess(Scope.POINTS_WRITE, "updates.merchant_id"),
    "PointsService/GetPointsAccount": MethodAccess(Scope.POINTS_READ),
    "PointsService/ListPointsEntries": MethodAccess(Scope.POINTS_READ),
    "PointsService/ListDriftingAccounts": MethodAccess(Scope.POINTS_READ),
    "PointsService/ListExpiringPoints": MethodAccess(Scope.POINTS_READ),
    "PointsService/VoidPointsEntries": MethodAccess(Scope.ADMIN),
    "PointsService/UnvoidPointsEntries": MethodAccess(Scope.ADMIN),
    "RedemptionService/ValidateRedemption": MethodAccess(Scope.REDEEM, "customer.merchant_id"),
    "RedemptionService/IssueValidationCode": MethodAccess(Scope.CODES, "customer.merchant_id"),
    "RedemptionService/ConfirmMissedCall": MethodAccess(Scope.TELEPHONY),
    "RedemptionService/ResetValidationLimits": MethodAccess(Scope.ADMIN, "customer.merchant_id"),
    "RedemptionService/RedeemPoints": MethodAccess(Scope.REDEEM, "customer.merchant_id"),
    "RedemptionService/ReverseRedemption": MethodAccess(Scope.REDEEM),
    "RedemptionService/SettleRedemption": MethodAccess(Scope.ADMIN),
    "RedemptionService/GetRedemption": MethodAccess(Scope.REDEEM),
    "RedemptionService/ListRedemptions": MethodAccess(Scope.REDEEM),
    "RedemptionService/ListValidationEvents": MethodAccess(Scope.SUPPORT),
    "RedemptionService/ListRefusals": MethodAccess(Scope.SUPPORT),
    "RedemptionService/ListCustomerTimeline": MethodAccess(Scope.SUPPORT),
    "RedemptionService/GetCustomerPoints": MethodAccess(Scope.POINTS_READ, "customer.merchant_id"),
    "ProgramsService/PutStore": MethodAccess(Scope.STORES, "store.merchant_id"),
    "ProgramsService/GetStore": MethodAccess(Scope.STORES),
    "ProgramsService/ListStores": MethodAccess(Scope.STORES),
    "ProgramsService/RequestStoreErasure": MethodAccess(Scope.WEBHOOKS),
    "ProgramsService/ListStoreErasures": MethodAccess(Scope.STORES),
    "ProgramsService/EraseStore": MethodAccess(Scope.ADMIN),
    "ProgramsService/ReleaseStore": MethodAccess(Scope.ADMIN, for_all_merchants=True),
    "ProgramsService/PutProgram": MethodAccess(Scope.ADMIN, "program.merchant_id"),
    "ProgramsService/GetProgram": MethodAccess(Scope.REDEEM),
    "ProgramsService/ListPrograms": MethodAccess(Scope.REDEEM),
    "BenefitsService/PutBenefit": MethodAccess(Scope.ADMIN, "benefit.merchant_id"),
    "BenefitsService/GetBenefit": MethodAccess(Scope.POINTS_READ),
    "BenefitsService/ListBenefits": MethodAccess(Scope.POINTS_READ),
    "BenefitsService/DeleteBenefit": MethodAccess(Scope.ADMIN),
    "BenefitsService/PreviewBenefitSchedule": MethodAccess(Scope.POINTS_READ),
    "BenefitsService/ListApplicableBenefits": MethodAccess(Scope.POINTS_READ),
    "BenefitsService/PutCustomPrivilege": MethodAccess(Scope.ADMIN, "custom_privilege.merchant_id"),
    "BenefitsService/GetCustomPrivilege": MethodAccess(Scope.POINTS_READ),
    "BenefitsService/ListCustomPrivileges": MethodAccess(Scope.POINTS_READ),
    "BenefitsService/DeleteCustomPrivilege": MethodAccess(Scope.ADMIN),
    "CustomersService/PutCustomer": MethodAccess(Scope.ADMIN, "customer.merchant_id"),
    "CustomersService/GetCustomer": MethodAccess(Scope.ADMIN),
    "CustomersService/ApplyCustomerUpdate": MethodAccess(Scope.POINTS_WRITE),
    "CustomersService/MoveIdentifier": MethodAccess(Scope.ADMIN),
    "CustomersService/RedactCustomer": MethodAccess(Scope.ADMIN),
    "CustomersService/PutUserGroup": MethodAccess(Scope.ADMIN, "user_group.merchant_id"),
    "CustomersService/GetUserGroup": MethodAccess(Scope.POINTS_READ),
    "CustomersService/DeleteUserGroup": MethodAccess(Scope.ADMIN),
    "WebhooksService/QuarantineWebhook": MethodAccess(Scope.WEBHOOKS),
    "WebhooksService/ListQuarantinedWebhooks": MethodAccess(Scope.WEBHOOKS),
    "WebhooksService/GetQuarantinedWebhook": MethodAccess(Scope.WEBHOOKS),
    "WebhooksService/ReplayQuarantinedWebhook": MethodAccess(
        Scope.WEBHOOKS,
        further_merchant_paths=(
            "points_update.merchant_id",
            "customer_update.merchant_id",
            "store_erasure.merchant_id",
        ),
    ),
    "WebhooksService/DropQuarantinedWebhook": MethodAccess(Scope.ADMIN),
}
"""The methods of package pointbook.v1, by service and method."""


def merchants_of(message: Any, access: MethodAccess) -> set[str]:
    """Return all merchants that a request names.

    The result is empty for a method that requires a token for all merchants.
    """
    if access.for_all_merchants:
        return set()
    paths = (access.merchant_path, *access.further_merchant_paths)
    return {merchant_id for path in paths for merchant_id in merchants_at(message, path)}


def merchants_at(message: Any, path: str) -> Iterator[str]:
    """Yield the merchants at a path of a request, through repeated fields too."""
    name, _, rest = path.partition(".")
    value = getattr(message, name)
    if not rest:
        yield value
    elif hasattr(value, "DESCRIPTOR"):
        if message.HasField(name):
            yield from merchants_at(value, rest)
    else:
        for item in value:
            yield from merchants_at(item, rest)
