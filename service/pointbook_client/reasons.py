"""The exceptions of calls, one for each reason.

Generated from proto/pointbook/v1/errors.proto by `make gen`. Do not edit.
"""

from pointbook_client.errors import (
    AbortedError,
    AlreadyExistsError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    PointbookError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)


class InvalidFieldsError(InvalidArgumentError):
    """The error INVALID_FIELDS.

    Fields are missing, malformed, out of bounds or contradictory.

    - Cure: correct every field that BadRequest lists by path, such as `update.updated_value: "must be 0 to 10^15"`.
    - gRPC code: INVALID_ARGUMENT.
    - Metadata: `omitted_violations`, only if BadRequest could not hold all of them: how many are left out.
    - Retry: no, the request must change.
    """


class TokenMissingError(UnauthenticatedError):
    """The error TOKEN_MISSING.

    The call has no bearer token.

    - Cure: send the metadata `authorization: Bearer TOKEN`.
    - gRPC code: UNAUTHENTICATED.
    - Metadata: none.
    - Retry: no, the request must change.
    """


class TokenInvalidError(UnauthenticatedError):
    """The error TOKEN_INVALID.

    The bearer token is unknown or revoked, or bound to another client certificate.

    - Cure: create a token with `pointbook token create` and configure the client with it, or send a bound token
      with its certificate. See docs/configuration.md#bound-tokens.
    - gRPC code: UNAUTHENTICATED.
    - Metadata: none.
    - Retry: no, an operator must act.
    """


class TokenExpiredError(UnauthenticatedError):
    """The error TOKEN_EXPIRED.

    The bearer token has expired.

    - Cure: create a new token with `pointbook token create` and replace the old one. Before a token expires,
      `pointbook token rotate` replaces it without a gap.
    - gRPC code: UNAUTHENTICATED.
    - Metadata: `token_id`, such as "3f9c…".
    - Retry: no, an operator must act.
    """


class ScopeMissingError(PermissionDeniedError):
    """The error SCOPE_MISSING.

    The token does not have the scope of the method.

    - Cure: use a token with the scope that the method's comment names.
    - gRPC code: PERMISSION_DENIED.
    - Metadata: `scope`, the missing one, such as "points.write".
    - Retry: no, an operator must act.
    """


class MerchantForbiddenError(PermissionDeniedError):
    """The error MERCHANT_FORBIDDEN.

    The token does not cover the merchant of the request.

    - Cure: correct the `merchant_id`, or use a token for this merchant or for all merchants.
    - gRPC code: PERMISSION_DENIED.
    - Metadata: `merchant_id`, such as "2000009999".
    - Retry: no, an operator must act.
    """


class StoreNotFoundError(NotFoundError):
    """The error STORE_NOT_FOUND.

    The store is not registered, or belongs to another merchant.

    - Cure: register the store with ProgramsService.PutStore, or correct the `merchant_id` or `store_id`. See
      docs/operations.md#register-stores.
    - gRPC code: NOT_FOUND. Resource: pointbook.v1.Store, named by `store_id`.
    - Metadata: `store_id`, such as "1718263946864"; `registered_elsewhere`: "true" if another merchant has the
      store, only in responses to updates, and only to tokens for all merchants.
    - Retry: no, until the state has changed.
    """


class ProgramNotFoundError(NotFoundError):
    """The error PROGRAM_NOT_FOUND.

    The merchant has no such program.

    - Cure: create the program with ProgramsService.PutProgram, or correct the `program_id`.
    - gRPC code: NOT_FOUND. Status code: 1101. Resource: pointbook.v1.Program, named by `program_id`.
    - Metadata: `program_id`, such as "7".
    - Retry: no, until the state has changed.
    """


class CustomerNotFoundError(NotFoundError):
    """The error CUSTOMER_NOT_FOUND.

    No customer of the merchant has this identifier.

    - Cure: create the customer with CustomersService.PutCustomer, or correct the identifier.
    - gRPC code: NOT_FOUND. Status code: 816.
    - Metadata: `identifier`, the kind of identifier in a redemption request, such as "mobile"; or `field`, the path
      of the field that names the customer, if the request names several, such as "to_customer_id".
    - Retry: no, until the state has changed.
    """


class GroupNotFoundError(NotFoundError):
    """The error GROUP_NOT_FOUND.

    The merchant has no such user group, or the customer has no default group.

    - Cure: create the group with CustomersService.PutUserGroup, or correct the reference.
    - gRPC code: NOT_FOUND. Status code: 1632. Resource: pointbook.v1.UserGroup, named by `group_id`.
    - Metadata: `group_id`, such as "12"; absent from refused redemptions.
    - Retry: no, until the state has changed.
    """


class EntryNotFoundError(NotFoundError):
    """The error ENTRY_NOT_FOUND.

    The ledger has no entry with this event_id.

    - Cure: correct the `event_id`; ListPointsEntries lists the entries of an account.
    - gRPC code: NOT_FOUND. Resource: pointbook.v1.PointsEntry, named by `event_id`.
    - Metadata: `event_id`, such as "e-1".
    - Retry: no, until the state has changed.
    """


class RedemptionNotFoundError(NotFoundError):
    """The error REDEMPTION_NOT_FOUND.

    The merchant has no such redemption.

    - Cure: correct the `redemption_id` or the reference number; ListRedemptions lists them.
    - gRPC code: NOT_FOUND. Resource: pointbook.v1.Redemption, named by `redemption_id`.
    - Metadata: `redemption_id`, such as "r-1"; absent if the request named a reference number.
    - Retry: no, until the state has changed.
    """


class BenefitNotFoundError(NotFoundError):
    """The error BENEFIT_NOT_FOUND.

    The merchant has no such benefit.

    - Cure: correct the `benefit_id`; ListBenefits lists them. Or put or import the benefit.
    - gRPC code: NOT_FOUND. Resource: pointbook.v1.Benefit, named by `benefit_id`.
    - Metadata: `benefit_id`, such as "b-1".
    - Retry: no, until the state has changed.
    """


class WebhookNotFoundError(NotFoundError):
    """The error WEBHOOK_NOT_FOUND.

    The merchant's quarantine has no such webhook.

    - Cure: correct the `merchant_id` of the quarantine or the `quarantine_id`; ListQuarantinedWebhooks lists them.
    - gRPC code: NOT_FOUND. Resource: pointbook.v1.QuarantinedWebhook, named by `quarantine_id`.
    - Metadata: `quarantine_id`, such as "q-1".
    - Retry: no, until the state has changed.
    """


class CustomPrivilegeNotFoundError(NotFoundError):
    """The error CUSTOM_PRIVILEGE_NOT_FOUND.

    The merchant has no such custom privilege.

    - Cure: correct the `privilege_id`; ListCustomPrivileges lists them. Or put or import the privilege.
    - gRPC code: NOT_FOUND. Resource: pointbook.v1.CustomPrivilege, named by `privilege_id`.
    - Metadata: `privilege_id`, such as "p-1".
    - Retry: no, until the state has changed.
    """


class EventIdReusedError(AlreadyExistsError):
    """The error EVENT_ID_REUSED.

    The event_id is already stored with different content.

    - Cure: use a unique `event_id` for each event; ListPointsEntries has the stored one. For a deletion and an
      update of one buyer and moment, have an operator decide:
      ReplayQuarantinedWebhookRequest.overrides_contradiction.
    - gRPC code: ALREADY_EXISTS.
    - Metadata: `event_id`, such as "e-1".
    - Retry: no, the request must change.
    """


class ReferenceReusedError(AlreadyExistsError):
    """The error REFERENCE_REUSED.

    The external_reference_number belongs to a call with different content.

    - Cure: use a unique `external_reference_number` for each redemption and each reversal.
    - gRPC code: ALREADY_EXISTS.
    - Metadata: `external_reference_number`, such as "order-17".
    - Retry: no, the request must change.
    """


class IdentifierTakenError(AlreadyExistsError):
    """The error IDENTIFIER_TAKEN.

    An identifier in the request belongs to another customer or group.

    - Cure: move the identifier with CustomersService.MoveIdentifier, or leave it out. BadRequest lists every such
      field.
    - gRPC code: ALREADY_EXISTS.
    - Metadata: `identifier`, the path of the first such field, such as "customer.mobile".
    - Retry: no, the request must change.
    """


class StoreTakenError(AlreadyExistsError):
    """The error STORE_TAKEN.

    The store belongs to another merchant. Only tokens that may register any store get this error; others get
    STORE_UNPROVEN.

    - Cure: correct the `merchant_id`, or release the store with ProgramsService.ReleaseStore or `pointbook store
      release`.
    - gRPC code: ALREADY_EXISTS.
    - Metadata: `store_id`, such as "1718263946864".
    - Retry: no, the request must change.
    """


class StaleEtagError(AbortedError):
    """The error STALE_ETAG.

    The resource has changed since the etag was read.

    - Cure: read the resource again, reapply the change, and send the new etag.
    - gRPC code: ABORTED.
    - Metadata: none.
    - Retry: no, the request must change.
    """


class TransactionConflictError(AbortedError):
    """The error TRANSACTION_CONFLICT.

    Concurrent transactions kept conflicting with this one.

    - Cure: send the same request again after RetryInfo.
    - gRPC code: ABORTED.
    - Metadata: none.
    - Retry: yes, soon.
    """


class SendLimitReachedError(ResourceExhaustedError):
    """The error SEND_LIMIT_REACHED.

    A send limit is reached: too many messages to this destination or for this merchant, too many missed calls for
    this customer, or a region that the program does not allow.

    - Cure: wait for RetryInfo. For "allowed_regions", change Program.allowed_regions. ResetValidationLimits clears
      a customer's counters.
    - gRPC code: RESOURCE_EXHAUSTED.
    - Metadata: `limit`: "destination", "merchant", "missed_calls" or "allowed_regions".
    - Retry: yes, later (RetryInfo).
    """


class QueueFullError(ResourceExhaustedError):
    """The error QUEUE_FULL.

    Too many calls are running or waiting, too many unknown tokens are waiting for a lookup, or the quarantine is
    full. Nothing of this call was stored.

    - Cure: send the same request again after RetryInfo. If it keeps failing, an operator adds workers, or drops
      webhooks if the quarantine is full. See docs/operations.md#limits-on-callers and docs/webhooks.md#limits.
    - gRPC code: RESOURCE_EXHAUSTED.
    - Metadata: none.
    - Retry: yes, soon.
    """


class DatabaseUnavailableError(UnavailableError):
    """The error DATABASE_UNAVAILABLE.

    The database is unreachable, unresponsive, read-only or overloaded, or tokens could not be read for too long.

    - Cure: send the same request again after RetryInfo. If it keeps failing, see docs/operations.md#health.
    - gRPC code: UNAVAILABLE.
    - Metadata: none.
    - Retry: yes, soon.
    """


class ShuttingDownError(UnavailableError):
    """The error SHUTTING_DOWN.

    This server is stopping.

    - Cure: send the same request again; another server will accept it.
    - gRPC code: UNAVAILABLE.
    - Metadata: none.
    - Retry: yes, soon.
    """


class CodeKeyUnknownError(UnavailableError):
    """The error CODE_KEY_UNKNOWN.

    This server lacks the key that a code was signed with or that a quarantined webhook was encrypted with. Another
    server may have it.

    - Cure: send the same request again. If it keeps failing, an operator adds the key to POINTBOOK_CODE_KEYS or
      POINTBOOK_QUARANTINE_KEYS of all servers. See docs/operations.md#rotating-keys.
    - gRPC code: UNAVAILABLE.
    - Metadata: `key_id`, such as "2026-05"; only for webhooks.
    - Retry: yes, soon.
    """


class KeyNotConfiguredError(FailedPreconditionError):
    """The error KEY_NOT_CONFIGURED.

    This server has no key to sign a code, to encrypt a customer webhook, or to hash a redacted customer.

    - Cure: an operator sets the named setting, the same in all servers. See docs/operations.md#rotating-keys.
    - gRPC code: FAILED_PRECONDITION.
    - Metadata: `setting`, such as "POINTBOOK_CODE_KEYS".
    - Retry: no, an operator must act.
    """


class PointsNotPositiveError(InvalidArgumentError):
    """The error POINTS_NOT_POSITIVE.

    Fewer than one point would be redeemed.

    - Cure: request at least one point.
    - gRPC code: INVALID_ARGUMENT. Status code: 801.
    - Metadata: `points`, such as "0".
    - Retry: no, the request must change.
    """


class CurrencyValueNotWholePointsError(InvalidArgumentError):
    """The error CURRENCY_VALUE_NOT_WHOLE_POINTS.

    The currency value is not a whole number of points.

    - Cure: request one of the nearest values in the metadata. They are whole points within the program's
      `multiples_of`, minimum and maxima (per redemption, day, week and month), with at most 3 decimals and 12
      digits before the point. A value that does not exist is left out.
    - gRPC code: INVALID_ARGUMENT. Status code: 801.
    - Metadata: `currency_value`: "0.015", `point_value`: "0.01", `lower_currency_value`: "0.01", `lower_points`:
      "1", `higher_currency_value`: "0.02", `higher_points`: "2".
    - Retry: no, the request must change.
    """


class IdentifierInvalidError(InvalidArgumentError):
    """The error IDENTIFIER_INVALID.

    The customer's identifier is malformed.

    - Cure: correct the identifier; CustomerRef describes the accepted forms. See
      docs/customers.md#how-identifiers-are-compared.
    - gRPC code: INVALID_ARGUMENT. Status code: 802.
    - Metadata: `identifier`, the kind of identifier, such as "mobile".
    - Retry: no, the request must change.
    """


class InsufficientPointsError(FailedPreconditionError):
    """The error INSUFFICIENT_POINTS.

    Fewer points are active than requested; or an update without a balance would take the account below zero.

    - Cure: redeem fewer points, or wait until the customer has more. An update that was refused once stays refused
      under its `event_id`, unless it sets `forget_refusal`.
    - gRPC code: FAILED_PRECONDITION. Status code: 803.
    - Metadata: `active_points`: "20", `points`: "210" for a redemption; `event_id`, `updated_value` for an update.
    - Retry: no, until the state has changed.
    """


class BalanceBelowRequiredError(FailedPreconditionError):
    """The error BALANCE_BELOW_REQUIRED.

    The customer has fewer active points than `min_balance_required`.

    - Cure: wait until the customer has enough points.
    - gRPC code: FAILED_PRECONDITION. Status code: 804.
    - Metadata: `active_points`: "20", `min_balance_required`: "100".
    - Retry: no, until the state has changed.
    """


class LifetimePointsBelowRequiredError(FailedPreconditionError):
    """The error LIFETIME_POINTS_BELOW_REQUIRED.

    The customer has earned fewer points than `min_lifetime_points`.

    - Cure: wait until the customer has earned enough points.
    - gRPC code: FAILED_PRECONDITION. Status code: 805.
    - Metadata: `lifetime_points`: "20", `min_lifetime_points`: "100".
    - Retry: no, until the state has changed.
    """


class NotAMultipleError(FailedPreconditionError):
    """The error NOT_A_MULTIPLE.

    The points are not a multiple of `multiples_of`.

    - Cure: request a multiple.
    - gRPC code: FAILED_PRECONDITION. Status code: 807.
    - Metadata: `points`: "15", `multiples_of`: "10".
    - Retry: no, the request must change.
    """


class CodeInvalidError(FailedPreconditionError):
    """The error CODE_INVALID.

    The code is wrong, expired, already used, locked, or issued for another redemption. The response does not say
    which.

    - Cure: check the code with the customer, or issue a new one. ListValidationEvents says why it was refused;
      ResetValidationLimits ends a lock.
    - gRPC code: FAILED_PRECONDITION. Status code: 808.
    - Metadata: none.
    - Retry: no, the request must change.
    """


class CustomerBlockedError(FailedPreconditionError):
    """The error CUSTOMER_BLOCKED.

    The customer is blocked (Customer.fraud_blocked).

    - Cure: an operator unblocks the customer with CustomersService.PutCustomer.
    - gRPC code: FAILED_PRECONDITION. Status code: 809.
    - Metadata: none.
    - Retry: no, until the state has changed.
    """


class RedemptionFailedError(FailedPreconditionError):
    """The error REDEMPTION_FAILED.

    The customer, the group or the program changed while the call was running.

    - Cure: send the same request again.
    - gRPC code: FAILED_PRECONDITION. Status code: 817.
    - Metadata: none.
    - Retry: yes, soon.
    """


class AboveMaxPerRedemptionError(FailedPreconditionError):
    """The error ABOVE_MAX_PER_REDEMPTION.

    More points are requested than `max_points_per_redemption`.

    - Cure: request fewer points.
    - gRPC code: FAILED_PRECONDITION. Status code: 819.
    - Metadata: `points`: "210", `max_points_per_redemption`: "200".
    - Retry: no, the request must change.
    """


class AboveMaxPerDayError(FailedPreconditionError):
    """The error ABOVE_MAX_PER_DAY.

    The customer would redeem more points in this day than `max_points_per_day`, in the program's time zone.

    - Cure: request fewer points, or wait for the next day.
    - gRPC code: FAILED_PRECONDITION. Status code: 819.
    - Metadata: `points`: "60", `redeemed_points`: "450" (already redeemed in this day), `max_points_per_day`:
      "500".
    - Retry: no, until the state has changed.
    """


class AboveMaxPerWeekError(FailedPreconditionError):
    """The error ABOVE_MAX_PER_WEEK.

    The customer would redeem more points in this week than `max_points_per_week`, in the program's time zone.

    - Cure: request fewer points, or wait for the next week.
    - gRPC code: FAILED_PRECONDITION. Status code: 819.
    - Metadata: `points`: "60", `redeemed_points`: "450" (already redeemed in this week), `max_points_per_week`:
      "500".
    - Retry: no, until the state has changed.
    """


class AboveMaxPerMonthError(FailedPreconditionError):
    """The error ABOVE_MAX_PER_MONTH.

    The customer would redeem more points in this month than `max_points_per_month`, in the program's time zone.

    - Cure: request fewer points, or wait for the next month.
    - gRPC code: FAILED_PRECONDITION. Status code: 819.
    - Metadata: `points`: "60", `redeemed_points`: "450" (already redeemed in this month), `max_points_per_month`:
      "500".
    - Retry: no, until the state has changed.
    """


class BelowMinPerRedemptionError(FailedPreconditionError):
    """The error BELOW_MIN_PER_REDEMPTION.

    Fewer points are requested than `min_points_per_redemption`.

    - Cure: request more points.
    - gRPC code: FAILED_PRECONDITION. Status code: 821.
    - Metadata: `points`: "10", `min_points_per_redemption`: "50".
    - Retry: no, the request must change.
    """


class MissedCallNotSeenError(FailedPreconditionError):
    """The error MISSED_CALL_NOT_SEEN.

    The customer has not called the number yet.

    - Cure: have the customer call, and send the same request again. See docs/codes.md#missed-calls.
    - gRPC code: FAILED_PRECONDITION. Status code: 822.
    - Metadata: none.
    - Retry: no, until the state has changed.
    """


class MissedCallNotEnabledError(FailedPreconditionError):
    """The error MISSED_CALL_NOT_ENABLED.

    The program does not validate by missed call.

    - Cure: choose another `validation_type`, or add MISSED_CALL to the program's channels.
    - gRPC code: FAILED_PRECONDITION. Status code: 823.
    - Metadata: none.
    - Retry: no, the request must change.
    """


class ValidationRequiredError(FailedPreconditionError):
    """The error VALIDATION_REQUIRED.

    The program requires a validation and the request has none.

    - Cure: issue a code and send it, or confirm a missed call.
    - gRPC code: FAILED_PRECONDITION. Status code: 824.
    - Metadata: none.
    - Retry: no, the request must change.
    """


class SkipNotAllowedError(FailedPreconditionError):
    """The error SKIP_NOT_ALLOWED.

    The program does not allow skipping the validation, or the token lacks the scope `redeem.skip`.

    - Cure: send a validation code, or use a token and a program that allow skipping.
    - gRPC code: FAILED_PRECONDITION. Status code: 824.
    - Metadata: none.
    - Retry: no, the request must change.
    """


class RedemptionDisabledError(FailedPreconditionError):
    """The error REDEMPTION_DISABLED.

    Redemption is switched off for the program.

    - Cure: set Program.redemption_enabled.
    - gRPC code: FAILED_PRECONDITION. Status code: 827.
    - Metadata: none.
    - Retry: no, until the state has changed.
    """


class GroupRedemptionNotAllowedError(FailedPreconditionError):
    """The error GROUP_REDEMPTION_NOT_ALLOWED.

    The program does not allow group redemption.

    - Cure: leave out `user_group2`, or set Program.allow_group_redemption.
    - gRPC code: FAILED_PRECONDITION. Status code: 828.
    - Metadata: none.
    - Retry: no, the request must change.
    """


class CrossProgramRedemptionNotAllowedError(FailedPreconditionError):
    """The error CROSS_PROGRAM_REDEMPTION_NOT_ALLOWED.

    The program does not accept points of other programs.

    - Cure: leave out `group_redemption`, or set Program.allow_cross_program_redemption.
    - gRPC code: FAILED_PRECONDITION. Status code: 828.
    - Metadata: none.
    - Retry: no, the request must change.
    """


class NoDestinationError(FailedPreconditionError):
    """The error NO_DESTINATION.

    The code cannot be sent: the customer has no contact, this server does not use any of the program's channels, or
    the program sends no SMS to this type of phone number (sms_number_types).

    - Cure: add a mobile number or e-mail address to the customer, or change the program's channels. See
      docs/codes.md#numbers.
    - gRPC code: FAILED_PRECONDITION. Status code: 860.
    - Metadata: `validation_type`: "SMS", `number_type`: "FIXED_LINE", only for a phone number of the wrong type.
    - Retry: no, until the state has changed.
    """


class ChannelNotEnabledError(FailedPreconditionError):
    """The error CHANNEL_NOT_ENABLED.

    The program or this server does not send codes by the requested channel.

    - Cure: choose another `validation_type`, or leave it unset; or an operator configures a sender for it. See
      docs/delivery.md.
    - gRPC code: FAILED_PRECONDITION. Status code: 860.
    - Metadata: `validation_type`, such as "EMAIL".
    - Retry: no, the request must change.
    """


class DeliveryFailedError(UnavailableError):
    """The error DELIVERY_FAILED.

    The provider did not accept the message, or it is unknown whether it did.

    - Cure: send the same request again after RetryInfo; it then sends another message.
    - gRPC code: UNAVAILABLE. Status code: 860.
    - Metadata: none.
    - Retry: yes, soon.
    """


class NotAGroupMemberError(FailedPreconditionError):
    """The error NOT_A_GROUP_MEMBER.

    The customer is not a member who may redeem from the group.

    - Cure: add the customer to the group with `can_redeem`, or unblock the member, with PutUserGroup.
    - gRPC code: FAILED_PRECONDITION. Status code: 1620.
    - Metadata: none.
    - Retry: no, until the state has changed.
    """


class CrossProgramMisconfiguredError(FailedPreconditionError):
    """The error CROSS_PROGRAM_MISCONFIGURED.

    Another program that allows its points to be redeemed here has a different point value or currency.

    - Cure: an operator gives both programs the same `point_value` and `currency_code`, or disallows one.
    - gRPC code: FAILED_PRECONDITION. Status code: 3316.
    - Metadata: `program_id` of the other program, such as "2".
    - Retry: no, an operator must act.
    """


class AlreadyReversedError(FailedPreconditionError):
    """The error ALREADY_REVERSED.

    Fewer points of the redemption are left than the call would reverse, or none.

    - Cure: request at most the points that are left.
    - gRPC code: FAILED_PRECONDITION. Status code: 3802.
    - Metadata: `redemption_id`, such as "r-1"; `left_points`, how many can still be reversed.
    - Retry: no, the request must change.
    """


class RedemptionSettledError(FailedPreconditionError):
    """The error REDEMPTION_SETTLED.

    SHOPLINE has already deducted the points, so the hold cannot be released.

    - Cure: refund the points in SHOPLINE; its webhook returns them to the account.
    - gRPC code: FAILED_PRECONDITION.
    - Metadata: `redemption_id`, such as "r-1"; `reversible_points`, how many can still be reversed here.
    - Retry: no, the request must change.
    """


class AboveMaxPerMissedCallError(FailedPreconditionError):
    """The error ABOVE_MAX_PER_MISSED_CALL.

    More points are requested than a missed call may validate in this program (max_points_missed_call).

    - Cure: request fewer points, validate by a code, or raise `max_points_missed_call`.
    - gRPC code: FAILED_PRECONDITION. Status code: 819.
    - Metadata: `points`: "600", `max_points_missed_call`: "500".
    - Retry: no, the request must change.
    """


class ContactChangedError(FailedPreconditionError):
    """The error CONTACT_CHANGED.

    The customer's mobile number or e-mail address changed recently, and gets no codes for a while (24 hours by
    default).

    - Cure: use the other channel, or wait for RetryInfo.
    - gRPC code: FAILED_PRECONDITION. Status code: 860.
    - Metadata: `validation_type`, such as "SMS".
    - Retry: yes, later (RetryInfo).
    """


class TokenLimitReachedError(ResourceExhaustedError):
    """The error TOKEN_LIMIT_REACHED.

    The token has too many calls running, or has made too many calls within a second. Nothing of this call was
    stored.

    - Cure: send the same request again after RetryInfo, with fewer calls at a time. Or an operator raises
      POINTBOOK_TOKEN_CALLS_MAX or POINTBOOK_TOKEN_CALLS_PER_SECOND_MAX.
    - gRPC code: RESOURCE_EXHAUSTED.
    - Metadata: `limit`: "concurrent_calls" or "calls_per_second", `max`: "500".
    - Retry: yes, later (RetryInfo).
    """


class ClockWrongError(UnavailableError):
    """The error CLOCK_WRONG.

    The clocks of this server and the database differ by more than 30 seconds, so the server rejects calls.

    - Cure: send the same request again; another server may accept it. An operator corrects the clock. See
      docs/operations.md#clocks.
    - gRPC code: UNAVAILABLE.
    - Metadata: none.
    - Retry: yes, soon.
    """


class StoreUnprovenError(FailedPreconditionError):
    """The error STORE_UNPROVEN.

    The merchant has not registered the store, and the token may not register it: the token is not for all merchants
    with the scope `admin`, and no quarantined webhook proves that the store is the merchant's. The error is the
    same whether another merchant has the store or not.

    - Cure: an operator registers the store. See docs/operations.md#register-stores.
    - gRPC code: FAILED_PRECONDITION.
    - Metadata: `store_id`, such as "1718263946864".
    - Retry: no, an operator must act.
    """


class StoreInUseError(FailedPreconditionError):
    """The error STORE_IN_USE.

    The store has data of its merchant, so it cannot be released.

    - Cure: delete the data, if it may be deleted; otherwise the store stays with its merchant.
    - gRPC code: FAILED_PRECONDITION.
    - Metadata: `store_id`, such as "1718263946864"; `used_by`, the table with the data, such as "points_accounts".
    - Retry: no, until the state has changed.
    """


BY_REASON: dict[str, type[PointbookError]] = {
    "INVALID_FIELDS": InvalidFieldsError,
    "TOKEN_MISSING": TokenMissingError,
    "TOKEN_INVALID": TokenInvalidError,
    "TOKEN_EXPIRED": TokenExpiredError,
    "SCOPE_MISSING": ScopeMissingError,
    "MERCHANT_FORBIDDEN": MerchantForbiddenError,
    "STORE_NOT_FOUND": StoreNotFoundError,
    "PROGRAM_NOT_FOUND": ProgramNotFoundError,
    "CUSTOMER_NOT_FOUND": CustomerNotFoundError,
    "GROUP_NOT_FOUND": GroupNotFoundError,
    "ENTRY_NOT_FOUND": EntryNotFoundError,
    "REDEMPTION_NOT_FOUND": RedemptionNotFoundError,
    "BENEFIT_NOT_FOUND": BenefitNotFoundError,
    "WEBHOOK_NOT_FOUND": WebhookNotFoundError,
    "CUSTOM_PRIVILEGE_NOT_FOUND": CustomPrivilegeNotFoundError,
    "EVENT_ID_REUSED": EventIdReusedError,
    "REFERENCE_REUSED": ReferenceReusedError,
    "IDENTIFIER_TAKEN": IdentifierTakenError,
    "STORE_TAKEN": StoreTakenError,
    "STALE_ETAG": StaleEtagError,
    "TRANSACTION_CONFLICT": TransactionConflictError,
    "SEND_LIMIT_REACHED": SendLimitReachedError,
    "QUEUE_FULL": QueueFullError,
    "DATABASE_UNAVAILABLE": DatabaseUnavailableError,
    "SHUTTING_DOWN": ShuttingDownError,
    "CODE_KEY_UNKNOWN": CodeKeyUnknownError,
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "KEY_NOT_CONFIGURED": KeyNotConfiguredError,
    "INTERNAL": InternalError,
    "POINTS_NOT_POSITIVE": PointsNotPositiveError,
    "CURRENCY_VALUE_NOT_WHOLE_POINTS": CurrencyValueNotWholePointsError,
    "IDENTIFIER_INVALID": IdentifierInvalidError,
    "INSUFFICIENT_POINTS": InsufficientPointsError,
    "BALANCE_BELOW_REQUIRED": BalanceBelowRequiredError,
    "LIFETIME_POINTS_BELOW_REQUIRED": LifetimePointsBelowRequiredError,
    "NOT_A_MULTIPLE": NotAMultipleError,
    "CODE_INVALID": CodeInvalidError,
    "CUSTOMER_BLOCKED": CustomerBlockedError,
    "REDEMPTION_FAILED": RedemptionFailedError,
    "ABOVE_MAX_PER_REDEMPTION": AboveMaxPerRedemptionError,
    "ABOVE_MAX_PER_DAY": AboveMaxPerDayError,
    "ABOVE_MAX_PER_WEEK": AboveMaxPerWeekError,
    "ABOVE_MAX_PER_MONTH": AboveMaxPerMonthError,
    "BELOW_MIN_PER_REDEMPTION": BelowMinPerRedemptionError,
    "MISSED_CALL_NOT_SEEN": MissedCallNotSeenError,
    "MISSED_CALL_NOT_ENABLED": MissedCallNotEnabledError,
    "VALIDATION_REQUIRED": ValidationRequiredError,
    "SKIP_NOT_ALLOWED": SkipNotAllowedError,
    "REDEMPTION_DISABLED": RedemptionDisabledError,
    "GROUP_REDEMPTION_NOT_ALLOWED": GroupRedemptionNotAllowedError,
    "CROSS_PROGRAM_REDEMPTION_NOT_ALLOWED": CrossProgramRedemptionNotAllowedError,
    "NO_DESTINATION": NoDestinationError,
    "CHANNEL_NOT_ENABLED": ChannelNotEnabledError,
    "DELIVERY_FAILED": DeliveryFailedError,
    "NOT_A_GROUP_MEMBER": NotAGroupMemberError,
    "CROSS_PROGRAM_MISCONFIGURED": CrossProgramMisconfiguredError,
    "ALREADY_REVERSED": AlreadyReversedError,
    "REDEMPTION_SETTLED": RedemptionSettledError,
    "ABOVE_MAX_PER_MISSED_CALL": AboveMaxPerMissedCallError,
    "CONTACT_CHANGED": ContactChangedError,
    "TOKEN_LIMIT_REACHED": TokenLimitReachedError,
    "CLOCK_WRONG": ClockWrongError,
    "STORE_UNPROVEN": StoreUnprovenError,
    "STORE_IN_USE": StoreInUseError,
}
"""The exception of each reason."""
