"""How callers want customers to be validated, and what speaks against it: pure."""

from collections.abc import Iterator
from dataclasses import dataclass

from pointbook_server.errors import PointbookError, Reason
from pointbook_server.redemption.assessment import Assessment
from pointbook_server.redemption.rules import Violation, finding

CODE_INVALID = finding(Reason.CODE_INVALID, "The code is not valid for this redemption.")
MISSED_CALL_NOT_SEEN = finding(Reason.MISSED_CALL_NOT_SEEN, "No missed call was seen for this redemption.")


@dataclass(frozen=True, slots=True)
class ValidationEvidence:
    """How a caller wants the customer to be validated: by a code, by a missed call, or by going without.

    A challenge_id without a code is that of a missed call. `may_skip` is whether the caller may go without at all,
    `is_coming` whether a code is to be issued by the same call, `actor` the id of the caller's token.
    """

    code: str = ""
    challenge_id: str = ""
    skips: bool = False
    may_skip: bool = False
    is_coming: bool = False
    actor: str = ""

    @property
    def is_given(self) -> bool:
        """Whether there is something to check."""
        return bool(self.code or self.challenge_id)

    @property
    def wrong(self) -> Violation:
        """What is against it where it is wrong."""
        return CODE_INVALID if self.code else MISSED_CALL_NOT_SEEN

    def findings(self, assessment: Assessment) -> Iterator[Violation]:
        """Find what speaks against the way of validation, but for the code or the call itself."""
        program = assessment.facts.program
        if program is None:
            return
        demanding = assessment.demanding
        if self.skips:
            if not self.may_skip or not all(each.validation.allow_skip for each in (program, *demanding)):
                yield finding(Reason.SKIP_NOT_ALLOWED, "The validation must not be skipped here.")
        elif not self.is_given and not self.is_coming and demanding:
            yield finding(Reason.VALIDATION_REQUIRED, "The program wants the customer to be validated.")


def code_not_issued(error: PointbookError) -> Violation:
    """Return the warning that the points are redeemable, but that their code was not issued."""
    return finding(
        Reason.CODE_NOT_ISSUED,
        "The points may be redeemed, but the code could not be issued.",
        **{**error.metadata, "cause": error.reason.value},
    )
