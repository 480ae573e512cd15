"""The validation of the customer, and its violations: pure.

Source: docs/reference/redemption.md#required-validation
"""

from collections.abc import Iterator
from typing import NamedTuple

from pointbook_server.errors import PointbookError
from pointbook_server.reasons import Reason
from pointbook_server.redemption.assessment import Assessment
from pointbook_server.redemption.violations import Violation

CODE_INVALID = Violation.of(Reason.CODE_INVALID, "The code is not valid for this redemption.")
MISSED_CALL_NOT_SEEN = Violation.of(Reason.MISSED_CALL_NOT_SEEN, "No missed call was seen for this redemption.")


class ValidationEvidence(NamedTuple):
    """The evidence that the customer is validated: a code, a missed call, or none.

    A challenge_id without a code is that of a missed call. `skips` asks to skip the validation, and `may_skip` is
    whether the caller's token allows that. `issues_code` is whether the same call issues a code. `actor` is the id of
    the token.
    """

    code: str = ""
    challenge_id: str = ""
    skips: bool = False
    may_skip: bool = False
    issues_code: bool = False
    actor: str = ""

    @property
    def is_given(self) -> bool:
        """Whether there is a code or a missed call to check."""
        return bool(self.code or self.challenge_id)

    @property
    def rejection(self) -> Violation:
        """The violation if the code or the missed call is rejected."""
        return CODE_INVALID if self.code else MISSED_CALL_NOT_SEEN

    def violations(self, assessment: Assessment) -> Iterator[Violation]:
        """Yield the violations of the rules of validation.

        The code or the missed call itself is checked elsewhere.
        """
        program = assessment.context.program
        if program is None:
            return
        requiring = assessment.programs_requiring_validation
        if self.skips:
            if not self.may_skip or not all(each.validation.allow_skip for each in (program, *requiring)):
                yield Violation.of(Reason.SKIP_NOT_ALLOWED, "The validation must not be skipped here.")
        elif not self.is_given and not self.issues_code and requiring:
            yield Violation.of(Reason.VALIDATION_REQUIRED, "The program requires that the customer is validated.")


def code_not_issued(error: PointbookError) -> Violation:
    """Return the warning that a code was not issued for redeemable points."""
    return Violation.of(
        Reason.CODE_NOT_ISSUED,
        "The points may be redeemed, but the code could not be issued.",
        **{**error.metadata, "cause": error.reason.value},
    )
